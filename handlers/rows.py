"""A line of an output or error file as one flat row, for the handlers that fill tables (postgres, parquet). Pure.

The engine's body stays the bytes that it is; only what has a column of its own is decoded.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from handlers.base import Delivery
from vllm_batch_dagster.core.answers import read_answer
from vllm_batch_dagster.core.repair import said_texts

ANSWERED, FAILED = "answered", "failed"
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NO_JSON = (b"", b"null")


class _Response(msgspec.Struct):
    status_code: int
    request_id: str | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


class _Body(msgspec.Struct):
    model: str | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


class _Error(msgspec.Struct):
    code: str | int | None = None
    message: str | None = None
    type: str | None = None


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One line. `status` is `answered` (a 2xx answer) or `failed`. `answer` is the text of the first choice, None for
    tool calls, embeddings and scores; tokens are None where the engine counted none. `response` is the engine's body
    and `error` what went wrong, both as JSON; a failed line with a body has its error in both.
    """

    custom_id: str
    status: str
    status_code: int | None
    request_id: str | None
    model: str | None
    answer: str | None
    finish_reason: str | None
    input_tokens: int | None
    output_tokens: int | None
    error_code: str | None
    error_message: str | None
    response: bytes | None
    error: bytes | None


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_body = msgspec.json.Decoder(_Body).decode
_decode_error = msgspec.json.Decoder(_Error).decode


def read_rows(delivery: Delivery) -> Iterator[ResultRow]:
    """Yield the rows of both files, one at a time. Raises msgspec.DecodeError for what is no line of a result."""
    for line in delivery.results.lines():
        yield read_row(line, delivery.batch.model)


def read_row(line: bytes, model: str | None = None) -> ResultRow:
    """Return the row of a line; `model` is the batch's, for a line whose body names none."""
    read = _decode_line(line)
    answer = read.response or _Response(0)
    body = bytes(answer.body)
    facts, said = read_answer(body), _read_body(body)
    is_answered = 200 <= answer.status_code < 300
    error = b"" if is_answered else _first_json(bytes(read.error), bytes(said.error), body)
    told = _read_error(error)
    has_usage = facts.usage.total_tokens > 0
    return ResultRow(
        custom_id=read.custom_id,
        status=ANSWERED if is_answered else FAILED,
        status_code=answer.status_code or None,
        request_id=answer.request_id,
        model=said.model or model,
        answer=next(iter(said_texts(body)), None) if is_answered else None,
        finish_reason=next(iter(facts.finish_reasons), None) if is_answered else None,
        input_tokens=facts.usage.input_tokens if has_usage else None,
        output_tokens=facts.usage.output_tokens if has_usage else None,
        error_code=str(told.code or told.type or "error") if error else None,
        error_message=told.message,
        response=body if body not in _NO_JSON else None,
        error=error or None,
    )


def _read_body(body: bytes) -> _Body:
    try:
        return _decode_body(body)
    except _UNREADABLE:  # a body in a shape of its own: it has no model and no error that we know
        return _Body()


def _read_error(error: bytes) -> _Error:
    try:
        return _decode_error(error)
    except _UNREADABLE:
        return _Error()


def _first_json(*candidates: bytes) -> bytes:
    return next((each for each in candidates if each not in _NO_JSON), b"")
