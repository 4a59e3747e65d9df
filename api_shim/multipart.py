"""A multipart/form-data upload as it streams in: the part with the contents goes to a sink, others are fields.

No second copy on disk, no whole part in memory, parts in any order. Called in a thread, by the routes that take files
and parts.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api_shim.errors import UNSUPPORTED_TYPE
from vllm_batch_dagster.core.errors import InvalidInput

if TYPE_CHECKING:  # the library defines it for type checkers only
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELDS = 64
MAX_FIELD_BYTES = 16 << 10
FILE_PART = "file"
DATA_PART = "data"  # of an upload in parts


class Sink(Protocol):
    """Where the bytes of the file part go."""

    def write(self, data: bytes | bytearray) -> None: ...


class UploadForm:
    """Push parser: `feed` blocks of the body, then `close`. `fields` and `filename` fill up on the way.

    `open_sink` is called once, when the part named `contents` begins.
    """

    def __init__(self, boundary: bytes, open_sink: Callable[[], Sink], contents: str = FILE_PART) -> None:
        self._contents = contents
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._open_sink = open_sink
        self._sink: Sink | None = None
        self._receive: Callable[[bytes | bytearray], None] = self._collect
        self._name = ""
        self._text = bytearray()
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._ended = False
        self._is_in_contents = self._is_plain = False
        self._delimiter_bytes = len(boundary) + 6  # with the two bytes behind it, which end the part or the body
        self._tail = b""  # the last bytes that the parser got: blocks may be shorter than a delimiter
        self._parser = self._make_parser(boundary)

    @property
    def has_file(self) -> bool:
        return self._sink is not None

    def feed(self, data: bytes | bytearray) -> None:
        """Raises InvalidInput for a body that is not multipart, and whatever the sink raises.

        A delimiter begins with a carriage return, and lines of JSON seldom have one: to look for that one byte is
        many times cheaper than to look for the delimiter.
        """
        if self._is_plain and b"\r" not in data:
            self._receive(data)
            return
        try:
            self._parser.write(bytes(data))
        except FormParserError as failure:
            raise InvalidInput(f"The multipart body of your request is broken: {failure}.") from failure
        # Plain from here: contents, and the parser holds nothing back that may be the head of a delimiter.
        self._tail = (self._tail + data[-self._delimiter_bytes :])[-self._delimiter_bytes :]
        self._is_plain = self._is_in_contents and b"\r" not in self._tail

    def close(self) -> None:
        """Raises InvalidInput when the body stopped before its closing boundary."""
        if not self._ended:
            raise InvalidInput("The multipart body of your request ends before its closing boundary.")

    def _make_parser(self, boundary: bytes) -> MultipartParser:
        try:
            return MultipartParser(boundary, self._callbacks())
        except FormParserError as failure:
            raise InvalidInput(f"The multipart boundary of your request is wrong: {failure}.") from failure

    def _callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open_part,
            "on_part_data": lambda data, start, end: self._receive(data[start:end]),
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._name, self._disposition = "", b""
        self._text.clear()

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _open_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidInput("A part of the multipart body has no name in its Content-Disposition header.")
        self._name = _decode(options[b"name"])
        if self._name != self._contents:
            self._receive = self._collect
            return
        if self._sink is not None:
            raise InvalidInput(
                f"The form has two '{self._contents}' parts. Send one per request.", param=self._contents
            )
        self.filename = _decode(options[b"filename"]) if b"filename" in options else None
        self._sink = self._open_sink()
        self._receive = self._sink.write
        self._is_in_contents = True

    def _collect(self, data: bytes | bytearray) -> None:
        if len(self._text) + len(data) > MAX_FIELD_BYTES:
            raise InvalidInput(
                f"The form field '{self._name}' is longer than {MAX_FIELD_BYTES} bytes.", param=self._name
            )
        self._text += data

    def _end_part(self) -> None:
        self._is_in_contents = False
        if self._name == self._contents:
            return
        if len(self.fields) == MAX_FIELDS:
            raise InvalidInput(f"The form has more than {MAX_FIELDS} fields.")
        self.fields[self._name] = _decode(bytes(self._text))

    def _end(self) -> None:
        self._ended = True


def read_boundary(headers: Mapping[str, str]) -> bytes:
    """Return the boundary of the request's body. Raises InvalidInput for another content type."""
    kind, options = parse_options_header(headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise InvalidInput(
            f"Unsupported content type: '{headers.get('content-type', '')}'. Send a form of the type "
            "multipart/form-data, the contents as one part of it.",
            code=UNSUPPORTED_TYPE,
        )
    if not (boundary := options.get(b"boundary")):
        raise InvalidInput("The Content-Type header of your request names no multipart boundary.")
    return boundary


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
