"""One request line of the input file: bytes in, a checked line or its errors out. Called by validation, for each line.

Codes, params and messages are those seen on OpenAI's live API (contract D.4).
"""

import hashlib
from collections.abc import Callable, Iterator

import msgspec

from vllm_batch_dagster.core.models import ENDPOINTS, LineError
from vllm_batch_dagster.core.modes import ValidationMode

MAX_LINE_BYTES = 64 << 20
CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
_ABSENT, _NULL = msgspec.Raw(b""), msgspec.Raw(b"null")
_MISSING = (b"", b"null")
_QUOTED_LETTERS = 100  # of a name in a message: a failed batch carries a thousand of them
_LABELS = {
    CHAT: "Chat Completions",
    "/v1/completions": "Completions",
    "/v1/responses": "Responses",
}


class _Request(msgspec.Struct):
    """A line with everything in its place: the only shape that most files have."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Head(msgspec.Struct):
    """What must be known of a body that is in order."""

    model: str
    stream: bool | None = None
    messages: msgspec.Raw = _ABSENT


class _Envelope(msgspec.Struct):
    """A line of which nothing is sure, to say what is wrong with it."""

    custom_id: msgspec.Raw = _ABSENT
    method: msgspec.Raw = _ABSENT
    url: msgspec.Raw = _ABSENT
    body: msgspec.Raw = _ABSENT


class _Body(msgspec.Struct):
    model: msgspec.Raw = _ABSENT
    stream: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT


class _Embedded(msgspec.Struct):
    input: msgspec.Raw = _ABSENT


class RequestLine(msgspec.Struct, frozen=True):
    """A line that passed validation, as it is sent. `body` is the user's bytes."""

    custom_id: str
    url: str
    body: msgspec.Raw


_request, _head = msgspec.json.Decoder(_Request), msgspec.json.Decoder(_Head)
_envelope, _body = msgspec.json.Decoder(_Envelope), msgspec.json.Decoder(_Body)
_line = msgspec.json.Decoder(RequestLine)
_text = msgspec.json.Decoder(str)
_embedded = msgspec.json.Decoder(_Embedded)
_items = msgspec.json.Decoder(list[msgspec.Raw])
_UNREADABLE = (UnicodeDecodeError, msgspec.DecodeError, RecursionError)  # the last: nested a thousand deep


class CheckedLine(msgspec.Struct, frozen=True):
    """A line that may run. `model` is the canonical name, `body` the user's bytes, untouched."""

    custom_id: str
    model: str
    url: str
    body: bytes


def read_line(raw: bytes) -> RequestLine:
    """Return a line that passed validation."""
    return _line.decode(raw)


def read_request(raw: bytes) -> tuple[str, bytes]:
    """Return (custom_id, body bytes) of a line that passed validation."""
    line = read_line(raw)
    return line.custom_id, bytes(line.body)


def find_custom_id(raw: bytes) -> str | None:
    """Return the custom_id of any line, None when it has none that is text."""
    try:
        raw.decode("utf-8")
        return _string(_envelope.decode(raw).custom_id)
    except _UNREADABLE:
        return None


def line_too_long(number: int) -> LineError:
    """Return the error of a line of more than MAX_LINE_BYTES."""
    message = f"This line is longer than {MAX_LINE_BYTES} bytes, the most that a request may have."
    return LineError("line_too_long", message, None, number)


def duplicate_id(number: int) -> LineError:
    """Return the error of a line whose custom_id stands on an earlier line."""
    message = (
        "The custom_id for this request is a duplicate of another request. "
        "The custom_id parameter must be unique for each request in a batch."
    )
    return LineError("duplicate_custom_id", message, "custom_id", number)


def hash_custom_id(custom_id: str) -> int:
    """Return the 64-bit hash under which the byte index keeps a custom_id."""
    digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def count_inputs(body: bytes) -> int:
    """Return how many embedding inputs a body holds: a text or a list of tokens is one, a list of those several."""
    given = bytes(_embedded.decode(body).input)
    if not given.startswith(b"["):
        return 1
    items = given[1:65].lstrip()
    if items[:1].isdigit() or items[:1] == b"-":
        return 1
    return len(_items.decode(given))


class LineChecker:
    """Checks lines against one batch: its endpoint, the models of this server, and in strict mode one model per file.

    `resolve` gives the canonical name of a model, or None when this server does not know it.
    """

    def __init__(
        self, endpoint: str, resolve: Callable[[str], str | None], mode: ValidationMode = ValidationMode.STRICT
    ) -> None:
        self._endpoint, self._resolve = endpoint, resolve
        self._is_strict = mode is ValidationMode.STRICT
        self._urls = frozenset((endpoint,) if self._is_strict else ENDPOINTS)
        self._model: str | None = None

    def check(self, raw: bytes, number: int) -> CheckedLine | tuple[LineError, ...]:
        """Check line `number` (1-based). Returns the line, or every error found on it."""
        return self._pass_good(raw) or self._diagnose(raw, number)

    def _pass_good(self, raw: bytes) -> CheckedLine | None:
        """Return the line if all is well: the short way, which says nothing about what is wrong."""
        try:
            if not raw.isascii():
                raw.decode("utf-8")  # msgspec does not look into what it passes over
            line = _request.decode(raw)
            head = _head.decode(line.body)
        except _UNREADABLE:
            return None
        if line.method != "POST" or line.url not in self._urls or head.stream:
            return None
        if line.url == CHAT and head.messages in (_ABSENT, _NULL):
            return None
        model = self._resolve(head.model)
        if model is None or not self._agrees(model):
            return None
        return CheckedLine(line.custom_id, model, line.url, bytes(line.body))

    def _agrees(self, model: str) -> bool:
        """Tell whether a line may have this model; in strict mode the first one seen is that of the file."""
        self._model = self._model or model
        return model == self._model or not self._is_strict

    def _diagnose(self, raw: bytes, number: int) -> CheckedLine | tuple[LineError, ...]:
        try:
            raw.decode("utf-8")
            envelope = _envelope.decode(raw)
        except _UNREADABLE:
            return (LineError("invalid_json_line", "This line is not parseable as valid JSON.", None, number),)
        custom_id = _string(envelope.custom_id)
        url = self._endpoint if self._is_strict else _string(envelope.url)
        errors = tuple(self._envelope_errors(envelope, custom_id, number))
        body = bytes(envelope.body)
        model, body_errors = self._check_body(body, url, number) if body else (None, ())
        if errors or body_errors or model is None or custom_id is None or url is None:
            return errors + body_errors
        return CheckedLine(custom_id, model, url, body)

    def _envelope_errors(self, line: _Envelope, custom_id: str | None, number: int) -> Iterator[LineError]:
        for name in ("custom_id", "method", "url", "body"):
            if bytes(getattr(line, name)) in _MISSING:
                message = f"Missing required parameter: '{name}'."
                yield LineError("missing_required_parameter", message, name, number)
        if custom_id is None and bytes(line.custom_id) not in _MISSING:
            yield LineError("invalid_type", "Invalid type for 'custom_id': expected a string.", "custom_id", number)
        if bytes(line.method) not in _MISSING and _string(line.method) != "POST":
            yield LineError("invalid_method", "The method must be 'POST'.", "method", number)
        if bytes(line.url) not in _MISSING and _string(line.url) not in self._urls:
            yield LineError("invalid_url", self._wrong_url(), "url", number)

    def _wrong_url(self) -> str:
        if self._is_strict:
            return "The URL provided for this request does not match the batch endpoint."
        return f"The URL provided for this request is none of those that this server runs: {', '.join(ENDPOINTS)}."

    def _check_body(self, body: bytes, url: str | None, number: int) -> tuple[str | None, tuple[LineError, ...]]:
        if body == b"null":
            return None, ()
        try:
            head = _body.decode(body)
        except msgspec.DecodeError:
            message = "Invalid type for 'body': expected an object."
            return None, (LineError("invalid_type", message, "body", number),)
        model, error = self._check_model(head, number)
        errors = [error] if error else []
        errors += self._content_errors(head, url, number)
        return model, tuple(errors)

    def _check_model(self, head: _Body, number: int) -> tuple[str | None, LineError | None]:
        name = _string(head.model)
        if not name:
            return None, LineError("invalid_request", "Model parameter is required.", "body.model", number)
        canonical = self._resolve(name)
        if canonical is None:
            message = f"The provided model '{name[:_QUOTED_LETTERS]}' is not supported by the Batch API."
            return None, LineError("model_not_found", message, "body.model", number)
        if not self._agrees(canonical):
            message = (
                f"The model '{name[:_QUOTED_LETTERS]}' for this request does not match the rest of the batch. "
                "Each batch must contain requests for a single model."
            )
            return None, LineError("mismatched_model", message, "body.model", number)
        return canonical, None

    def _content_errors(self, head: _Body, url: str | None, number: int) -> Iterator[LineError]:
        if bytes(head.stream) == b"true":
            message = f"{_LABELS.get(url or '', 'Requests')}: Streaming is not supported in the Batch API."
            yield LineError("streaming_unsupported", message, "body.stream", number)
        if url == CHAT and bytes(head.messages) in _MISSING:
            yield LineError("invalid_request", "Messages parameter is required.", "body.messages", number)


def _string(raw: msgspec.Raw) -> str | None:
    try:
        return _text.decode(raw)
    except msgspec.DecodeError:
        return None
