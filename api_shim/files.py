"""POST, GET and DELETE of /v1/files. Uploads go block by block from the socket to the file store.

The rules are in stages/intake.py and core/creation.py.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from api_shim.arrivals import FORM_OVERHEAD_BYTES, Arrival, announced_bytes, take_in
from api_shim.deps import CursorDep, FileDep, ProjectDep, Services, ServicesDep, unknown_cursor
from api_shim.downloads import DOWNLOAD_RESPONSES, send_contents
from api_shim.errors import error_responses
from api_shim.idempotency import IDEMPOTENCY_PARAMETER, Idempotency, IdempotencyDep
from api_shim.limits import storage_room
from api_shim.multipart import FILE_PART, UploadForm, read_boundary
from api_shim.presenters import present_file, present_files
from api_shim.schemas import UPLOAD_SCHEMA, DeletedFile, FileList, FileObject, request_body
from vllm_batch_dagster.core.claims import FILES
from vllm_batch_dagster.core.creation import (
    FileFacts,
    read_expiry,
    read_purpose,
    unsupported_value,
)
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import OUTPUT_PURPOSE, UPLOAD_PURPOSES, File
from vllm_batch_dagster.stages.intake import FileReceipt, delete_file, file_too_large, list_files

LISTED_PURPOSES = (*UPLOAD_PURPOSES, OUTPUT_PURPOSE, "assistants_output", "fine-tune-results")

router = APIRouter(prefix="/v1/files", tags=["files"])


def begin_arrival(
    boundary: bytes, services: Services, project_id: str, idempotency: Idempotency
) -> Arrival[FileReceipt, File]:
    """Return what takes in the body of one POST and keeps it as a file."""
    claim_key = idempotency.claim_key(FILES)

    def open_receipt(form: UploadForm) -> FileReceipt:
        if "purpose" in form.fields:  # a wrong purpose is refused before the bytes come
            read_purpose(form.fields["purpose"])
        room = storage_room(services, project_id, claim_key)
        return FileReceipt(services.files, services.randomness, services.settings.max_file_bytes, room)

    def keep(form: UploadForm, receipt: FileReceipt) -> File:
        facts = read_facts(form.fields, form.filename, project_id)
        if (room := storage_room(services, project_id, claim_key)) is not None:  # others may have taken it meanwhile
            room.check(receipt.size)
        file = receipt.finish(facts, services.store, services.clock, claim_key)
        if file.id != receipt.id:
            idempotency.mark_replayed()
        return file

    return Arrival(boundary, FILE_PART, open_receipt, keep)


@router.post(
    "",
    responses=error_responses(400, 403, 409, 413, 415, 507),
    openapi_extra=request_body("multipart/form-data", UPLOAD_SCHEMA) | IDEMPOTENCY_PARAMETER,
)
async def upload_file(
    request: Request, services: ServicesDep, project_id: ProjectDep, idempotency: IdempotencyDep
) -> FileObject:
    boundary = read_boundary(request.headers)
    most = services.settings.max_file_bytes
    if 0 < most < announced_bytes(request) - FORM_OVERHEAD_BYTES:
        raise file_too_large(most)
    arrival = begin_arrival(boundary, services, project_id, idempotency)
    return present_file(await take_in(request, arrival, services))


@router.get("", responses=error_responses(400))
def list_uploaded(
    services: ServicesDep,
    project_id: ProjectDep,
    after: CursorDep,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> FileList:
    if purpose is not None and purpose not in LISTED_PURPOSES:
        raise unsupported_value("purpose", purpose, LISTED_PURPOSES)
    try:
        page = list_files(
            services.store,
            services.clock(),
            purpose=purpose,
            after=after,
            limit=limit,
            order=order,
            project_id=project_id,
        )
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


@router.get("/{file_id}/content", response_class=StreamingResponse, responses=DOWNLOAD_RESPONSES)
def download_file(request: Request, file: FileDep, services: ServicesDep) -> Response:
    return send_contents(request, file, services)


@router.head("/{file_id}/content", include_in_schema=False)
def describe_download(request: Request, file: FileDep, services: ServicesDep) -> Response:
    return send_contents(request, file, services)


def read_facts(fields: Mapping[str, str], filename: str | None, project_id: str) -> FileFacts:
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
        project_id=project_id,
    )


def _as_integer(text: str) -> int | str:
    """The number that `text` spells, or `text` itself for the check to refuse."""
    is_number = text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 20
    return int(text) if is_number else text
