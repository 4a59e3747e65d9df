"""Repair rounds, which a batch asks for in its metadata: which answer is flawed, and what is asked instead. Pure.

    repair_schema: "2"      an answer that breaks the JSON that its request asked for is asked for again, at most twice
    repair_length: "4096"   an answer that was cut at its token budget is asked for once more with this one; also "2x"

Here alone a request is not the user's bytes: a repair changes the token budget, or the `seed` so that the repeat can
differ, and nothing else. Which answer is accepted: the first one without a flaw, else the last one that is a success.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.lines import CHAT

SCHEMA_KEY, LENGTH_KEY = "repair_schema", "repair_length"
MOST_ROUNDS = 5
MOST_TOKENS = 10_000_000
MOST_FACTOR = 100.0
_COMPLETIONS, _RESPONSES = "/v1/completions", "/v1/responses"
_DEFAULT_COMPLETION_TOKENS = 16  # vLLM's, where a completion names no budget
_COUNT = re.compile(r"[0-9]{1,8}")
_FACTOR = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)x")
# vLLM heeds the first of them that is there.
_BUDGETS: Mapping[str, tuple[str, ...]] = {
    CHAT: ("max_completion_tokens", "max_tokens"),
    _COMPLETIONS: ("max_tokens",),
    _RESPONSES: ("max_output_tokens",),
}
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Flaw(StrEnum):
    """Why an answer is asked for again. The value stands in the journal."""

    LENGTH = "length"
    SCHEMA = "schema"


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """`rounds` of schema repair, 0 = none. The larger budget: `tokens`, or `factor` times the old; both 0 = none."""

    rounds: int = 0
    tokens: int = 0
    factor: float = 0.0

    @property
    def heeds_length(self) -> bool:
        return self.tokens > 0 or self.factor > 0

    @property
    def is_on(self) -> bool:
        return self.rounds > 0 or self.heeds_length


def read_plan(metadata: Mapping[str, str] | None) -> RepairPlan:
    """Return what the metadata of a batch asks for. Raises InvalidInput for a value that means nothing."""
    asked = metadata or {}
    tokens, factor = _read_budget(asked[LENGTH_KEY]) if LENGTH_KEY in asked else (0, 0.0)
    return RepairPlan(_read_rounds(asked[SCHEMA_KEY]) if SCHEMA_KEY in asked else 0, tokens, factor)


def check_plan(metadata: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Return the metadata as it is. Raises InvalidInput."""
    read_plan(metadata)
    return metadata


def _read_rounds(text: str) -> int:
    if not _COUNT.fullmatch(text) or not 1 <= int(text) <= MOST_ROUNDS:
        raise _invalid(SCHEMA_KEY, text, f"the number of rounds, '1' to '{MOST_ROUNDS}'")
    return int(text)


def _read_budget(text: str) -> tuple[int, float]:
    if _COUNT.fullmatch(text) and 1 <= int(text) <= MOST_TOKENS:
        return int(text), 0.0
    found = _FACTOR.fullmatch(text)
    if found and 1 < float(found[1]) <= MOST_FACTOR:
        return 0, float(found[1])
    raise _invalid(LENGTH_KEY, text, "a number of tokens ('4096'), or a factor above 1 of the old budget ('2x')")


def _invalid(key: str, text: str, expected: str) -> InvalidInput:
    message = f"Invalid 'metadata.{key}': expected {expected}, but got '{text[:100]}'."
    return InvalidInput(message, param=f"metadata.{key}", code="invalid_value")


@dataclass(frozen=True, slots=True)
class Format:
    """What a request asked of its answer: JSON, an object at least, that fits `schema` (its bytes) if there is one."""

    schema: bytes | None = None


class _Schema(msgspec.Struct):
    schema: msgspec.Raw = msgspec.Raw(b"")


class _Asked(msgspec.Struct):
    type: str = ""
    json_schema: _Schema | None = None
    schema: msgspec.Raw = msgspec.Raw(b"")


class _Text(msgspec.Struct):
    format: _Asked | None = None


class _Question(msgspec.Struct):
    response_format: _Asked | None = None
    text: _Text | None = None


class _Sampling(msgspec.Struct):
    temperature: float | None = None
    seed: int | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    message: _Message | None = None
    text: str | None = None


class _Part(msgspec.Struct):
    type: str = ""
    text: str = ""


class _Item(msgspec.Struct):
    type: str = ""
    content: list[_Part] | None = None


class _Why(msgspec.Struct):
    reason: str | None = None


class _Said(msgspec.Struct):
    choices: list[_Choice] | None = None
    output: list[_Item] | None = None
    incomplete_details: _Why | None = None


_question, _sampling = msgspec.json.Decoder(_Question), msgspec.json.Decoder(_Sampling)
_said, _text_field = msgspec.json.Decoder(_Said), msgspec.json.Decoder(_Text)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_number = msgspec.json.Decoder(int)


def wanted_format(endpoint: str, body: bytes) -> Format | None:
    """Return the JSON that a request asks for, None when it asks for none."""
    try:
        question = _question.decode(body)
    except _UNREADABLE:
        return None
    asked = question.response_format
    if endpoint == _RESPONSES:
        asked = question.text.format if question.text else None
    if asked is None or asked.type not in ("json_schema", "json_object"):
        return None
    raw = bytes(asked.json_schema.schema if asked.json_schema else asked.schema)
    return Format(raw or None) if asked.type == "json_schema" else Format()


def said_texts(answer: bytes) -> list[str]:
    """Return the texts of an answer, one for each choice; none where a choice calls a tool instead."""
    try:
        said = _said.decode(answer)
    except _UNREADABLE:
        return []
    texts = [choice.message.content if choice.message else choice.text for choice in said.choices or ()]
    parts = [part.text for item in said.output or () for part in item.content or () if part.type == "output_text"]
    return [text for text in texts if text is not None] + (["".join(parts)] if parts else [])


def is_cut(answer: bytes) -> bool:
    """True when an answer ended at its token budget."""
    try:
        said = _said.decode(answer)
    except _UNREADABLE:
        return False
    if said.incomplete_details is not None and said.incomplete_details.reason == "max_output_tokens":
        return True
    return any(choice.finish_reason == "length" for choice in said.choices or ())


def enlarge(endpoint: str, body: bytes, plan: RepairPlan, prompt_tokens: int, longest: int | None) -> bytes | None:
    """Return the request with the larger budget, at most what `longest` (tokens of the model's context, None: not
    known) leaves beside the prompt. None when that is not more than before, or only the context was the limit."""
    name, old = _budget(endpoint, body)
    if not name:
        return None
    wanted = plan.tokens or math.ceil(old * plan.factor)
    if longest is not None:
        wanted = min(wanted, longest - prompt_tokens)
    return _with_field(body, name, wanted) if wanted > old else None


def reseed(body: bytes, round_: int) -> bytes | None:
    """Return the request with another seed. None at temperature 0: a repeat gives the same answer."""
    try:
        sampling = _sampling.decode(body)
    except _UNREADABLE:
        return None
    if sampling.temperature == 0:
        return None
    return _with_field(body, "seed", (sampling.seed or 0) + round_)


def _budget(endpoint: str, body: bytes) -> tuple[str, int]:
    """Return the field that bounds the answer and its value; no field when only the context does."""
    fields = _fields.decode(body)
    for name in _BUDGETS.get(endpoint, ()):
        try:
            return name, _number.decode(fields.get(name, msgspec.Raw(b"null")))
        except msgspec.DecodeError:
            continue
    return ("max_tokens", _DEFAULT_COMPLETION_TOKENS) if endpoint == _COMPLETIONS else ("", 0)


def _with_field(body: bytes, name: str, value: int) -> bytes:
    """Every other value stays the user's bytes."""
    return msgspec.json.encode(_fields.decode(body) | {name: msgspec.Raw(b"%d" % value)})
