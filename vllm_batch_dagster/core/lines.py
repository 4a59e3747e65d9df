"""One request line of the input file: bytes in, a checked line or its errors out. Called by validation, for each line.

Codes, params and messages are those seen on OpenAI's live API (contract D.4).
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from vllm_batch_dagster.core.models import LineError

MAX_LINE_BYTES = 64 << 20
_EMPTY = msgspec.Raw(b"")
_QUOTED_LETTERS = 100  # of a name in a message: a failed batch carries a thousand of them
_LABELS = {
    "/v1/chat/completions": "Chat Completions",
    "/v1/completions": "Completions",
    "/v1/responses": "Responses",
}


class _Envelope(msgspec.Struct):
    custom_id: msgspec.Raw = _EMPTY
    method: msgspec.Raw = _EMPTY
    url: msgspec.Raw = _EMPTY
    body: msgspec.Raw = _EMPTY


class _Body(msgspec.Struct):
    model: msgspec.Raw = _EMPTY
    stream: msgspec.Raw = _EMPTY
    messages: msgspec.Raw = _EMPTY


class _Sendable(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw


_envelope = msgspec.json.Decoder(_Envelope)
_body = msgspec.json.Decoder(_Body)
_text = msgspec.json.Decoder(str)
_sendable = msgspec.json.Decoder(_Sendable)


@dataclass(frozen=True, slots=True)
class CheckedLine:
    """A line that may run. `body` is the user's bytes, untouched."""

    custom_id: str
    model: str
    body: bytes


def read_request(raw: bytes) -> tuple[str, bytes]:
    """Return (custom_id, body bytes) of a line that passed validation."""
    line = _sendable.decode(raw)
    return line.custom_id, bytes(line.body)


def line_too_long(number: int) -> LineError:
    """Return the error of a line of more than MAX_LINE_BYTES."""
    message = f"This line is longer than {MAX_LINE_BYTES} bytes, the most that a request may have."
    return LineError("line_too_long", message, None, number)


def hash_custom_id(custom_id: str) -> int:
    """Return the 64-bit hash under which the byte index keeps a custom_id."""
    digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class LineChecker:
    """Checks lines against one batch: its endpoint, the models of this server, and one model per file.

    `resolve` gives the canonical name of a model, or None when this server does not know it.
    """

    def __init__(self, endpoint: str, resolve: Callable[[str], str | None]) -> None:
        self._endpoint = endpoint
        self._resolve = resolve
        self.model: str | None = None

    def check(self, raw: bytes, number: int) -> CheckedLine | tuple[LineError, ...]:
        """Check line `number` (1-based). Returns the line, or every error found on it."""
        try:
            raw.decode("utf-8")
            envelope = _envelope.decode(raw)
        except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):  # the last: nested a thousand deep
            return (LineError("invalid_json_line", "This line is not parseable as valid JSON.", None, number),)
        custom_id = _string(envelope.custom_id)
        errors = tuple(self._envelope_errors(envelope, custom_id, number))
        body = bytes(envelope.body)
        model, body_errors = self._check_body(body, number) if body else (None, ())
        if errors or body_errors or model is None or custom_id is None:
            return errors + body_errors
        return CheckedLine(custom_id, model, body)

    def _envelope_errors(self, line: _Envelope, custom_id: str | None, number: int) -> Iterator[LineError]:
        for name in ("custom_id", "method", "url", "body"):
            if bytes(getattr(line, name)) in (b"", b"null"):
                message = f"Missing required parameter: '{name}'."
                yield LineError("missing_required_parameter", message, name, number)
        if custom_id is None and bytes(line.custom_id) not in (b"", b"null"):
            yield LineError("invalid_type", "Invalid type for 'custom_id': expected a string.", "custom_id", number)
        if bytes(line.method) not in (b"", b"null", b'"POST"'):
            yield LineError("invalid_method", "The method must be 'POST'.", "method", number)
        if bytes(line.url) not in (b"", b"null") and _string(line.url) != self._endpoint:
            message = "The URL provided for this request does not match the batch endpoint."
            yield LineError("invalid_url", message, "url", number)

    def _check_body(self, body: bytes, number: int) -> tuple[str | None, tuple[LineError, ...]]:
        if body == b"null":
            return None, ()
        try:
            head = _body.decode(body)
        except msgspec.DecodeError:
            message = "Invalid type for 'body': expected an object."
            return None, (LineError("invalid_type", message, "body", number),)
        model, error = self._check_model(head, number)
        errors = [error] if error else []
        errors += self._content_errors(head, number)
        return model, tuple(errors)

    def _check_model(self, head: _Body, number: int) -> tuple[str | None, LineError | None]:
        name = _string(head.model)
        if not name:
            return None, LineError("invalid_request", "Model parameter is required.", "body.model", number)
        canonical = self._resolve(name)
        if canonical is None:
            message = f"The provided model '{name[:_QUOTED_LETTERS]}' is not supported by the Batch API."
            return None, LineError("model_not_found", message, "body.model", number)
        self.model = self.model or canonical
        if canonical != self.model:
            message = (
                f"The model '{name[:_QUOTED_LETTERS]}' for this request does not match the rest of the batch. "
                "Each batch must contain requests for a single model."
            )
            return None, LineError("mismatched_model", message, "body.model", number)
        return canonical, None

    def _content_errors(self, head: _Body, number: int) -> Iterator[LineError]:
        if bytes(head.stream) == b"true":
            label = _LABELS.get(self._endpoint, "Requests")
            message = f"{label}: Streaming is not supported in the Batch API."
            yield LineError("streaming_unsupported", message, "body.stream", number)
        if self._endpoint == "/v1/chat/completions" and bytes(head.messages) in (b"", b"null"):
            yield LineError("invalid_request", "Messages parameter is required.", "body.messages", number)


def _string(raw: msgspec.Raw) -> str | None:
    try:
        return _text.decode(raw)
    except msgspec.DecodeError:
        return None
