"""Sends the contents of a stored file: whole or in part, as it is or encoded, one block in memory at a time.

Called by the routes that answer with a file: /v1/files/{id}/content and /v1/batches/{id}/results.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import closing
from typing import Any, BinaryIO
from urllib.parse import quote

from anyio import to_thread
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from api_shim.byteranges import ByteRange, Unsatisfiable, is_known, may_resume, read_range
from api_shim.deps import Services
from api_shim.encodings import COMPRESSORS, Compressor, choose_encoding
from api_shim.errors import envelope, error_responses
from vllm_batch_dagster.core.models import File

BLOCK_BYTES = 1 << 20
RANGE_NOT_SATISFIABLE = "range_not_satisfiable"
# For the OpenAPI document: what a download can answer besides the whole file.
DOWNLOAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    206: {"description": "The bytes that the Range header asks for"},
    304: {"description": "The contents are those of If-None-Match"},
    **error_responses(404, 416),
}


def send_contents(
    request: Request, file: File, services: Services, media_type: str = "application/octet-stream"
) -> Response:
    """Return the answer to a GET or HEAD of the contents of `file`. Raises NotFound before anything is sent.

    A part is never encoded, so that its offsets are those of the file.
    """
    headers = request.headers
    etag = f'"{file.sha256}"'
    try:
        part = _find_part(request, etag, file.bytes)
    except Unsatisfiable:
        return _refuse_range(file.bytes)
    encoding = None if part else choose_encoding(headers.get("accept-encoding"), file.bytes)
    tag = etag if encoding is None else f'"{file.sha256}-{encoding}"'
    common = {"etag": tag, "vary": "Accept-Encoding", "accept-ranges": "bytes"}
    if is_known(headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=common)
    reader = services.files.open(file.id)
    return StreamingResponse(
        _read_nothing(reader) if request.method == "HEAD" else _make_body(reader, file, part, encoding, services),
        status_code=206 if part else 200,
        media_type=media_type,
        headers={**common, **_describe(file, part, encoding)},
    )


def _find_part(request: Request, etag: str, size: int) -> ByteRange | None:
    """Return the part asked for, None for the whole. Raises Unsatisfiable."""
    headers = request.headers
    if request.method == "HEAD" or not may_resume(headers.get("if-range"), etag):
        return None
    return read_range(headers.get("range"), size)


def _refuse_range(size: int) -> Response:
    return envelope(
        416,
        f"The file has {size} bytes and none of them is in the range of your request's Range header.",
        code=RANGE_NOT_SATISFIABLE,
        headers={"content-range": f"bytes */{size}", "accept-ranges": "bytes"},
    )


def _describe(file: File, part: ByteRange | None, encoding: str | None) -> Mapping[str, str]:
    """The headers that say what the body is. The length of an encoded one is not known before it is made."""
    name = {"content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}"}
    if encoding is not None:
        return {**name, "content-encoding": encoding}
    if part is None:
        return {**name, "content-length": str(file.bytes)}
    return {**name, "content-length": str(part.end - part.start), "content-range": part.describe(file.bytes)}


def _make_body(
    reader: BinaryIO, file: File, part: ByteRange | None, encoding: str | None, services: Services
) -> AsyncIterator[bytes]:
    if encoding is not None:
        return _pull(reader, _Encoding(reader, COMPRESSORS[encoding]()).next_block, services)
    span = part or ByteRange(0, file.bytes)
    reader.seek(span.start)
    return _pull(reader, _Span(reader, span.end - span.start).next_block, services)


async def _pull(reader: BinaryIO, next_block: Callable[[], bytes], services: Services) -> AsyncIterator[bytes]:
    with closing(reader):
        while block := await to_thread.run_sync(next_block, limiter=services.disk):
            yield block


async def _read_nothing(reader: BinaryIO) -> AsyncIterator[bytes]:
    reader.close()
    return
    yield


class _Span:
    """The next `length` bytes of a reader, block by block."""

    def __init__(self, reader: BinaryIO, length: int) -> None:
        self._reader, self._left = reader, length

    def next_block(self) -> bytes:
        block = self._reader.read(min(BLOCK_BYTES, self._left))
        self._left -= len(block)
        return block


class _Encoding:
    """The rest of a reader, compressed. A block may be small, but only the end is empty."""

    def __init__(self, reader: BinaryIO, compressor: Compressor) -> None:
        self._reader, self._compressor = reader, compressor
        self._ended = False

    def next_block(self) -> bytes:
        while not self._ended:
            data = self._reader.read(BLOCK_BYTES)
            self._ended = not data
            if block := self._compressor.compress(data) if data else self._compressor.flush():
                return block
        return b""
