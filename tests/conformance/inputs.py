"""The input files of the checklist, by name. A number that can share a batch does: each costs a run or three."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.target import Target

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
MOST_LINES = 50_000
SLOW_LINES = 2_000
UNKNOWN_FILE = "file-0123456789abcdef"
METADATA = {f"key-{number}": f"value {number}" for number in range(16)}

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Input:
    """What is sent. `tail` is raw bytes behind the lines; `parameters` are further ones of POST /v1/batches."""

    lines: Sequence[Line] = ()
    tail: bytes = b""
    endpoint: str = CHAT
    window: str = "24h"
    file_id: str = ""
    in_parts: bool = False
    is_extension: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        return b"".join(json.dumps(line).encode() + b"\n" for line in self.lines) + self.tail


def chat(number: int, model: str, **body: object) -> Line:
    messages = [{"role": "user", "content": f"Say something about the number {number}."}]
    return line(number, CHAT, model=model, messages=messages, **{"max_tokens": 16} | body)


def embed(number: int, model: str, **body: object) -> Line:
    return line(number, EMBEDDINGS, model=model, **{"input": f"the number {number}"} | body)


def line(number: int, url: str, **body: object) -> Line:
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body}


def without(sent: Line, name: str) -> Line:
    return {key: value for key, value in sent.items() if key != name}


def refused(number: int, model: str) -> Line:
    """A line that passes validation and that every engine answers with 400."""
    return chat(number, model, temperature=-1)


def expiring(target: Target, minutes: int = 1) -> Input:
    """[46] Cannot be done in its window, of one minute by default."""
    lines = [chat(number, target.slow_model) for number in range(SLOW_LINES * minutes)]
    return Input(lines, window=f"{minutes}m", is_extension=True)


def cut(target: Target) -> Input:
    """[47] Is cancelled while it runs."""
    return Input([chat(number, target.slow_model) for number in range(SLOW_LINES)])


def mixed(target: Target) -> Input:
    """[26, 27, 32, 39, 41, 43] Two lines succeed and one does not."""
    expiry = {"anchor": "created_at", "seconds": 3600}
    lines = [chat(1, target.model), refused(2, target.model), chat(3, target.model)]
    return Input(lines, parameters={"metadata": METADATA, "output_expires_after": expiry})


def all_refused(target: Target) -> Input:
    """[42] No line succeeds. The metadata is null [26]."""
    return Input([refused(number, target.model) for number in (1, 2)], parameters={"metadata": None})


def all_good(target: Target) -> Input:
    """[40] Every line succeeds. The ids are those of other batches too [53]; no metadata at all [26]."""
    return Input([embed(number, target.embedding_model) for number in (1, 2, 3)], endpoint=EMBEDDINGS)


def in_parts(target: Target) -> Input:
    """[24] Comes through the Uploads API."""
    return Input([chat(number, target.model) for number in (1, 2, 3)], in_parts=True)


def faulty(target: Target) -> Input:
    """[52 to 57] A line for every fault that makes a batch fail."""
    good = chat(0, target.model)
    missing = [without(chat(number, target.model), name) for number, name in enumerate(REQUIRED, 1)]
    return Input(
        [
            *missing,
            chat(5, target.model),
            chat(5, target.model),
            {**chat(7, target.model), "url": "/v1/completions"},
            chat(8, target.model, stream=True),
            chat(9, "nobody/knows-it"),
            {**good, "custom_id": "line-10", "body": without(good["body"], "model")},
            chat(11, target.embedding_model),
        ]
    )


def broken(target: Target) -> Input:
    """[51] Line 2 is no JSON."""
    return Input([chat(1, target.model)], tail=b'{"custom_id": "line-2", "method": "POST"\n')


def largest(target: Target) -> Input:
    """[58] As many lines as there may be. Cancelled as soon as it is accepted [48]."""
    return Input([chat(number, target.model) for number in range(MOST_LINES)])


def too_large(target: Target) -> Input:
    """[58] One line more."""
    return Input([chat(number, target.model) for number in range(MOST_LINES + 1)])


def too_many_inputs(target: Target) -> Input:
    """[58] Two lines with more embedding inputs than there may be lines."""
    half = ["a"] * (MOST_LINES // 2 + 1)
    lines = [embed(number, target.embedding_model, input=half) for number in (1, 2)]
    return Input(lines, endpoint=EMBEDDINGS)


def empty(_target: Target) -> Input:
    """[8] No line at all."""
    return Input()


def unknown_file(_target: Target) -> Input:
    """[30] The input file does not exist."""
    return Input(file_id=UNKNOWN_FILE)


def lenient(target: Target) -> Input:
    """[54, 57] Other urls than the endpoint, and two models."""
    lines = [chat(1, target.model), embed(2, target.embedding_model)]
    return Input(lines, parameters={"metadata": {"validation": "lenient"}})


REQUIRED = ("custom_id", "method", "url", "body")
INPUTS: Mapping[str, Callable[[Target], Input]] = {
    describe.__name__: describe
    for describe in (
        expiring,
        cut,
        mixed,
        all_refused,
        all_good,
        in_parts,
        lenient,
        faulty,
        broken,
        empty,
        unknown_file,
        largest,
        too_large,
        too_many_inputs,
    )
}
