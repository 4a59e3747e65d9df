"""Reads what we must know of an engine's answer body, without re-making it: finish reasons, usage, error code.

The body itself goes to the journal and to the output line as the engine's bytes (design section 3).
"""

from dataclasses import dataclass

import msgspec

from vllm_batch_dagster.core.models import Usage

_NO_USAGE = Usage()


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None
    choices: list[_Choice] | None = None
    status: str | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


class _Error(msgspec.Struct):
    type: str | None = None
    code: str | int | None = None


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """`error` is the engine's own error type, empty for an answer without one. `is_object` False: not even JSON."""

    is_object: bool = False
    finish_reasons: tuple[str, ...] = ()
    usage: Usage = _NO_USAGE
    error: str = ""


_answer = msgspec.json.Decoder(_Answer)
_error = msgspec.json.Decoder(_Error)
# Values stay bytes: what JSON allows and Python cannot hold (1e999, an integer of 5000 digits) passes untouched.
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NOTHING = msgspec.Raw(b"null")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read_answer(body: bytes) -> AnswerFacts:
    """Return the facts of a body; those of a body in an unknown shape are empty."""
    try:
        answer = _answer.decode(body)
    except _UNREADABLE:
        return AnswerFacts(is_object=_is_object(body))
    reasons = tuple(choice.finish_reason or "none" for choice in answer.choices or ())
    if not reasons and answer.status:
        reasons = (answer.status,)
    return AnswerFacts(True, reasons, _to_usage(answer.usage), _error_type(bytes(answer.error)))


def _is_object(body: bytes) -> bool:
    try:
        _object.decode(body)
    except _UNREADABLE:
        return False
    return True


def _to_usage(usage: _Usage | None) -> Usage:
    if usage is None:
        return Usage()
    into, out = _Details(), _Details()
    into = usage.prompt_tokens_details or usage.input_tokens_details or into
    out = usage.completion_tokens_details or usage.output_tokens_details or out
    return Usage(
        input_tokens=usage.prompt_tokens or usage.input_tokens or 0,
        cached_tokens=into.cached_tokens or 0,
        output_tokens=usage.completion_tokens or usage.output_tokens or 0,
        reasoning_tokens=out.reasoning_tokens or 0,
    )


def _error_type(raw: bytes) -> str:
    if raw in (b"", b"null"):
        return ""
    try:
        error = _error.decode(raw)
    except _UNREADABLE:
        return "error"
    return error.type or str(error.code or "error")


def describe_error(status: int, facts: AnswerFacts, body: bytes) -> str:
    """Return the kind of an error in a few words, for a table: `400 BadRequestError`, or the code of a line that got
    no response."""
    return f"{status} {facts.error}".strip() if status else _error_type(body)


def as_json_object(body: bytes, status: int) -> bytes:
    """Return `body` unchanged when it is a JSON object on one line and, for an error, in OpenAI's shape.

    Otherwise the smallest change that lets it stand in an output line: newlines between tokens become spaces, and
    text or `{"detail": ...}` is wrapped into OpenAI's error envelope (contract E.1; vllm-engine report 5.1).
    """
    try:
        body.decode("utf-8")
        parsed = _object.decode(body)
    except _UNREADABLE:
        return _wrap_error(body.decode("utf-8", "replace"), status)
    if status >= 400 and not bytes(parsed.get("error", _NOTHING)).startswith(b"{"):
        return _wrap_error(_message_of(parsed), status)
    # A raw newline can only stand between tokens: JSON strings escape theirs.
    return body.replace(b"\r", b" ").replace(b"\n", b" ") if b"\n" in body or b"\r" in body else body


def _message_of(parsed: dict[str, msgspec.Raw]) -> str:
    said = parsed.get("detail", parsed.get("error", parsed.get("message", _NOTHING)))
    try:
        return msgspec.json.decode(said, type=str)
    except _UNREADABLE:
        return msgspec.json.encode(parsed).decode()


def _wrap_error(message: str, status: int) -> bytes:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message[:4000], "type": kind, "param": None, "code": None}
    return msgspec.json.encode({"error": error})
