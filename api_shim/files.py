"""POST, GET and DELETE of /v1/files. Uploads go block by block from the socket to the file store.

The rules are in stages/intake.py and core/creation.py.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from threading import Lock
from typing import Annotated, BinaryIO, Literal
from urllib.parse import quote

from anyio import CancelScope, to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from api_shim.deps import CursorDep, FileDep, Services, ServicesDep, unknown_cursor
from api_shim.errors import error_responses
from api_shim.multipart import FILE_PART, Sink, UploadForm, read_boundary
from api_shim.presenters import present_file, present_files
from api_shim.schemas import UPLOAD_SCHEMA, DeletedFile, FileList, FileObject, request_body
from vllm_batch_dagster.core.creation import (
    FileFacts,
    missing_parameter,
    read_expiry,
    read_purpose,
    unsupported_value,
)
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import OUTPUT_PURPOSE, UPLOAD_PURPOSES, File
from vllm_batch_dagster.stages.intake import FileReceipt, delete_file, file_too_large, list_files

UPLOAD_BLOCK_BYTES = 1 << 20
DOWNLOAD_BLOCK_BYTES = 256 << 10
# Room for boundaries and fields when a Content-Length is held against the limit.
FORM_OVERHEAD_BYTES = 1 << 20
LISTED_PURPOSES = (*UPLOAD_PURPOSES, OUTPUT_PURPOSE, "assistants_output", "fine-tune-results")

router = APIRouter(prefix="/v1/files", tags=["files"])


class Upload:
    """One upload from its first byte to its File. Every method may block: call them in a thread.

    A cancelled request may leave `feed` running in its thread, so `abandon` waits for it and ends the upload.
    """

    def __init__(self, boundary: bytes, services: Services) -> None:
        self._services = services
        self._form = UploadForm(boundary, self._open_sink)
        self._receipt: FileReceipt | None = None
        self._turn = Lock()
        self._over = False

    def feed(self, block: bytes) -> None:
        """Raises InvalidInput, StorageFailure."""
        with self._turn:
            if not self._over:
                self._form.feed(block)

    def finish(self) -> File:
        """Store the file durably. Raises InvalidInput, StorageFailure."""
        with self._turn:
            self._form.close()
            facts = read_facts(self._form.fields, self._form.filename)
            if self._receipt is None:
                raise missing_parameter(FILE_PART)
            return self._receipt.finish(facts, self._services.store, self._services.clock)

    def abandon(self) -> None:
        """Leave nothing on disk. Harmless after `finish`."""
        with self._turn:
            self._over = True
            if self._receipt is not None:
                self._receipt.abandon()

    def _open_sink(self) -> Sink:
        if "purpose" in self._form.fields:  # a wrong purpose is refused before the bytes come
            read_purpose(self._form.fields["purpose"])
        services = self._services
        self._receipt = FileReceipt(services.files, services.randomness, services.settings.max_file_bytes)
        return self._receipt


@router.post(
    "",
    responses=error_responses(400, 413, 415, 507),
    openapi_extra=request_body("multipart/form-data", UPLOAD_SCHEMA),
)
async def upload_file(request: Request, services: ServicesDep) -> FileObject:
    boundary = read_boundary(request.headers)
    refuse_announced(request.headers, services.settings.max_file_bytes)
    with services.arrivals.counted():
        return present_file(await _take_in(request, Upload(boundary, services), services))


@router.get("", responses=error_responses(400))
def list_uploaded(
    services: ServicesDep,
    after: CursorDep,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> FileList:
    if purpose is not None and purpose not in LISTED_PURPOSES:
        raise unsupported_value("purpose", purpose, LISTED_PURPOSES)
    try:
        page = list_files(services.store, services.clock(), purpose=purpose, after=after, limit=limit, order=order)
    except NotFound as missing:
        raise unknown_cursor(after) from missing
    return present_files(page)


@router.get("/{file_id}", responses=error_responses(404))
def retrieve_file(file: FileDep) -> FileObject:
    return present_file(file)


@router.delete("/{file_id}", responses=error_responses(404, 409))
def remove_file(file: FileDep, services: ServicesDep) -> DeletedFile:
    delete_file(file.id, services.store, services.files, services.clock())
    return DeletedFile(id=file.id)


@router.get("/{file_id}/content", response_class=StreamingResponse, responses=error_responses(404))
def download_file(file: FileDep, services: ServicesDep) -> StreamingResponse:
    return stream_contents(file, services)


def stream_contents(file: File, services: Services, media_type: str = "application/octet-stream") -> StreamingResponse:
    """Return the bytes of `file`, one block in memory at a time. Raises NotFound before anything is sent."""
    reader = services.files.open(file.id)
    return StreamingResponse(
        _read_blocks(reader, services),
        media_type=media_type,
        headers={
            "content-length": str(file.bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        },
    )


def read_facts(fields: Mapping[str, str], filename: str | None) -> FileFacts:
    """Check the form's fields. Raises InvalidInput."""
    expiry = {
        name: _as_integer(text) if name == "seconds" else text
        for name in ("anchor", "seconds")
        if (text := fields.get(f"expires_after[{name}]")) is not None
    }
    return FileFacts(
        filename=filename or "",
        purpose=read_purpose(fields.get("purpose")),
        expires_after=read_expiry(expiry or None, "expires_after"),
    )


def refuse_announced(headers: Mapping[str, str], max_bytes: int) -> None:
    """Refuse at once what says itself that it is too large. Raises InvalidInput."""
    announced = _as_integer(headers.get("content-length", ""))
    if max_bytes and isinstance(announced, int) and announced > max_bytes + FORM_OVERHEAD_BYTES:
        raise file_too_large(max_bytes)


async def gather_blocks(stream: AsyncIterator[bytes], size: int) -> AsyncIterator[bytes]:
    """Join the socket's small reads into blocks of `size` bytes or a little more."""
    block = bytearray()
    async for data in stream:
        block += data
        if len(block) >= size:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


async def _take_in(request: Request, upload: Upload, services: Services) -> File:
    try:
        async for block in gather_blocks(request.stream(), UPLOAD_BLOCK_BYTES):
            await to_thread.run_sync(upload.feed, block, limiter=services.disk)
        return await to_thread.run_sync(upload.finish, limiter=services.disk)
    except BaseException:
        with CancelScope(shield=True):  # a client that goes away must not keep its partial file here
            await to_thread.run_sync(upload.abandon, limiter=services.disk)
        raise


async def _read_blocks(reader: BinaryIO, services: Services) -> AsyncIterator[bytes]:
    with closing(reader):
        while block := await to_thread.run_sync(reader.read, DOWNLOAD_BLOCK_BYTES, limiter=services.disk):
            yield block


def _as_integer(text: str) -> int | str:
    """The number that `text` spells, or `text` itself for the check to refuse."""
    is_number = text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 20
    return int(text) if is_number else text
