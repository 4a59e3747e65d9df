"""Renders output and error lines in OpenAI's format, and checks a merged pair of files against the byte index.

The engine's body is spliced in as it came (contract D.2, D.3). Called by the merge for every line, in input order.
"""

import hashlib
from collections.abc import Iterable, Iterator

import msgspec

from vllm_batch_dagster.core.journal import NO_RESPONSE, JournalRecord
from vllm_batch_dagster.core.lines import hash_custom_id
from vllm_batch_dagster.core.models import StopReason
from vllm_batch_dagster.core.rejections import Rejection

ENGINE_FAILURE = "engine_failure"

_MESSAGES = {
    StopReason.EXPIRED.value: "This request could not be executed before the completion window expired.",
    StopReason.CANCELLED.value: "This request was not executed because the batch was cancelled.",
    ENGINE_FAILURE: "The engine failed repeatedly before it could answer this request. Run the chunk again to retry.",
}


class _Named(msgspec.Struct):
    custom_id: str


_named = msgspec.json.Decoder(_Named)


def request_line_id(batch_id: str, line: int | str) -> str:
    """Return the id of a line of the output: the same on every merge of the same batch. `line` is 0-based in the byte
    index, or a name for a line that is not there."""
    return "batch_req_" + hashlib.blake2b(f"{batch_id}:{line}".encode(), digest_size=12).hexdigest()


def render_answer(batch_id: str, record: JournalRecord) -> bytes:
    """Return the line for a request that the engine answered, with any status, newline included; or for one that is
    known not to get an answer."""
    if record.status == NO_RESPONSE:
        line_id = request_line_id(batch_id, record.line).encode()
        custom_id = msgspec.json.encode(record.custom_id)
        return b'{"id":"%b","custom_id":%b,"response":null,"error":%b}\n' % (line_id, custom_id, bytes(record.body))
    return b'{"id":"%b","custom_id":%b,"response":{"status_code":%d,"request_id":%b,"body":%b},"error":null}\n' % (
        request_line_id(batch_id, record.line).encode(),
        msgspec.json.encode(record.custom_id),
        record.status,
        msgspec.json.encode(record.request_id),
        bytes(record.body),
    )


def render_unanswered(batch_id: str, line: int, custom_id: str, code: str) -> bytes:
    """Return the error line for a request without an answer; `code` says why (contract D.3)."""
    message = _MESSAGES.get(code, "This request was not executed.")
    return _render_error(request_line_id(batch_id, line), custom_id, code, message)


def render_rejection(batch_id: str, rejection: Rejection) -> bytes:
    """Return the error line for a line that lenient validation refused."""
    return _render_error(
        request_line_id(batch_id, f"refused:{rejection.line}"),
        rejection.custom_id,
        rejection.code,
        rejection.message,
    )


def _render_error(line_id: str, custom_id: str, code: str, message: str) -> bytes:
    row = {
        "id": line_id,
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return msgspec.json.encode(row) + b"\n"


def read_custom_id(line: bytes) -> str:
    """Return the custom_id of an output or error line."""
    return _named.decode(line).custom_id


class Tally:
    """What a walk over the merged files found. `problem` is empty when every line stands exactly once, in order."""

    def __init__(self) -> None:
        self.output_lines = 0
        self.error_lines = 0
        self.problem = ""


def reconcile_files(expected: Iterable[int], output: Iterable[bytes], errors: Iterable[bytes]) -> Tally:
    """Walk the input's id hashes beside both files, which keep input order, in constant memory.

    Proves at once: no line lost, none doubled, none foreign, and the order of each file.
    """
    tally = Tally()
    hashed_output, hashed_errors = _hashes(output), _hashes(errors)
    head_output, head_errors = next(hashed_output, None), next(hashed_errors, None)
    for line, id_hash in enumerate(expected, start=1):
        if head_output == id_hash:
            tally.output_lines += 1
            head_output = next(hashed_output, None)
        elif head_errors == id_hash:
            tally.error_lines += 1
            head_errors = next(hashed_errors, None)
        else:
            tally.problem = f"input line {line} is missing or out of order in the merged files"
            return tally
    if head_output is not None or head_errors is not None:
        tally.problem = "the merged files hold a line that is not in the input, or one twice"
    return tally


def covered_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Return the time that lies in at least one of the (begin, end) spans: chunks overlap at their borders."""
    covered = end = 0.0
    for first, last in sorted(spans):
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered


def _hashes(lines: Iterable[bytes]) -> Iterator[int]:
    for line in lines:
        yield hash_custom_id(read_custom_id(line))
