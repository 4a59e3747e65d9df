"""POST of /v1/uploads, its parts, complete and cancel. The rules are in stages/uploads.py and core/uploads.py."""

from threading import Event, Lock
from typing import Annotated

from anyio import CancelScope, to_thread
from fastapi import APIRouter, Depends, Request

from api_shim.arrivals import FORM_OVERHEAD_BYTES, Arrival, announced_bytes, take_in
from api_shim.deps import JsonDep, ProjectDep, Services, ServicesDep
from api_shim.errors import error_responses
from api_shim.idempotency import IDEMPOTENCY_PARAMETER, Idempotency, IdempotencyDep
from api_shim.limits import storage_room
from api_shim.multipart import DATA_PART, read_boundary
from api_shim.presenters import present_part, present_upload
from api_shim.schemas import (
    COMPLETE_UPLOAD_SCHEMA,
    CREATE_UPLOAD_SCHEMA,
    UPLOAD_PART_SCHEMA,
    UploadObject,
    UploadPartObject,
    request_body,
)
from vllm_batch_dagster.core.claims import COMPLETIONS, UPLOADS
from vllm_batch_dagster.core.creation import is_storable
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import File
from vllm_batch_dagster.core.uploads import (
    MAX_PART_BYTES,
    Completion,
    Upload,
    UploadPart,
    check_pending,
    part_too_large,
    read_completion,
)
from vllm_batch_dagster.stages.uploads import (
    PartReceipt,
    UploadPorts,
    cancel_upload,
    complete_upload,
    create_upload,
    find_upload,
)

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


def get_ports(services: ServicesDep) -> UploadPorts:
    return UploadPorts(services.store, services.files, services.clock, services.randomness)


PortsDep = Annotated[UploadPorts, Depends(get_ports)]


def get_upload(upload_id: str, ports: PortsDep, project_id: ProjectDep) -> Upload:
    if not is_storable(upload_id):
        raise NotFound("upload", upload_id)
    return find_upload(upload_id, ports, project_id)


UploadDep = Annotated[Upload, Depends(get_upload)]


@router.post(
    "",
    responses=error_responses(400, 403, 409, 413, 415),
    openapi_extra=request_body("application/json", CREATE_UPLOAD_SCHEMA) | IDEMPOTENCY_PARAMETER,
)
def begin_upload(
    params: JsonDep, services: ServicesDep, ports: PortsDep, project_id: ProjectDep, idempotency: IdempotencyDep
) -> UploadObject:
    claim_key = idempotency.claim_key(UPLOADS)
    upload = create_upload(
        params,
        ports,
        max_bytes=services.settings.max_file_bytes,
        room=storage_room(services, project_id, claim_key),
        project_id=project_id,
        claim_key=claim_key,
        on_repeat=idempotency.mark_replayed,
    )
    return present_upload(upload)


@router.post(
    "/{upload_id}/parts",
    responses=error_responses(400, 403, 404, 413, 415, 507),
    openapi_extra=request_body("multipart/form-data", UPLOAD_PART_SCHEMA),
)
async def add_part(request: Request, upload: UploadDep, services: ServicesDep, ports: PortsDep) -> UploadPartObject:
    boundary = read_boundary(request.headers)
    check_pending(upload)
    if announced_bytes(request) > MAX_PART_BYTES + FORM_OVERHEAD_BYTES:
        raise part_too_large()

    def open_receipt(_form: object) -> PartReceipt:
        return PartReceipt(upload, ports, storage_room(services, upload.project_id))

    def keep(_form: object, receipt: PartReceipt) -> UploadPart:
        return receipt.finish()

    arrival = Arrival(boundary, DATA_PART, open_receipt, keep)
    return present_part(await take_in(request, arrival, services))


@router.post(
    "/{upload_id}/complete",
    responses=error_responses(400, 404, 409, 413, 415, 507),
    openapi_extra=request_body("application/json", COMPLETE_UPLOAD_SCHEMA) | IDEMPOTENCY_PARAMETER,
)
async def complete(
    upload_id: str, params: JsonDep, upload: UploadDep, services: ServicesDep, idempotency: IdempotencyDep
) -> UploadObject:
    """A client that asks again while the first call is at work waits for it and gets the same file."""
    wanted = read_completion(params)
    with services.arrivals.counted():
        async with services.completions.of(upload.id):
            return present_upload(*await _join(_Joining(upload, wanted, services, idempotency), services))


@router.post("/{upload_id}/cancel", responses=error_responses(400, 404))
def cancel(upload: UploadDep, ports: PortsDep) -> UploadObject:
    """The body is not read: the openai client announces JSON and sends none."""
    return present_upload(cancel_upload(upload, ports))


class _Joining:
    """A completion at work in a thread, which a stop of the server can end between two blocks."""

    def __init__(self, upload: Upload, wanted: Completion, services: Services, idempotency: Idempotency) -> None:
        self._upload, self._wanted, self._services, self._idempotency = upload, wanted, services, idempotency
        self._stop, self._turn = Event(), Lock()

    def run(self) -> tuple[Upload, File]:
        with self._turn:
            ports, project_id = get_ports(self._services), self._upload.project_id
            upload = find_upload(self._upload.id, ports, project_id)  # as it is after our turn came
            return complete_upload(
                upload,
                self._wanted,
                ports,
                claim_key=self._idempotency.claim_key(COMPLETIONS),
                on_repeat=self._idempotency.mark_replayed,
                go_on=self._go_on,
            )

    def abandon(self) -> None:
        """Return when nothing is being written any more. Harmless after `run`."""
        self._stop.set()
        with self._turn:
            return

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise StateConflict("The server stops. Complete the upload again when it is back.")


async def _join(joining: _Joining, services: Services) -> tuple[Upload, File]:
    try:
        return await to_thread.run_sync(joining.run, limiter=services.disk)
    except BaseException:
        with CancelScope(shield=True):
            await to_thread.run_sync(joining.abandon, limiter=services.disk)
        raise
