"""POST /v1/batches/{id}/retry: a new batch of what did not succeed. Not OpenAI's. The rules: stages/retrying.py."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from api_shim.deps import BatchDep, ServicesDep, read_json_object
from api_shim.errors import envelope, error_responses
from api_shim.idempotency import IDEMPOTENCY_PARAMETER, IdempotencyDep
from api_shim.presenters import present_batch
from api_shim.schemas import RETRY_SCHEMA, BatchObject
from vllm_batch_dagster.composition import allowed_hosts
from vllm_batch_dagster.core.claims import BATCHES
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.stages.quotas import find_room
from vllm_batch_dagster.stages.retrying import RetryPorts, retry_batch

INPUT_GONE = "input_file_gone"
OPTIONAL_BODY = {"requestBody": {"required": False, "content": {"application/json": {"schema": RETRY_SCHEMA}}}}

router = APIRouter(prefix="/v1/batches", tags=["batches"])


async def read_optional_object(request: Request) -> dict[str, object]:
    """The JSON body; an empty one, which the openai client announces as JSON too, is no parameters."""
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    return await read_json_object(request) if has_body else {}


@router.post(
    "/{batch_id}/retry",
    response_model=BatchObject,
    responses=error_responses(400, 403, 404, 409, 413, 415, 507),
    openapi_extra=OPTIONAL_BODY | IDEMPOTENCY_PARAMETER,
)
async def retry(
    batch: BatchDep,
    params: Annotated[dict[str, object], Depends(read_optional_object)],
    services: ServicesDep,
    idempotency: IdempotencyDep,
) -> BatchObject | Response:
    if batch.purged_at is not None:
        return _explain_loss(batch, "its data was deleted after the time for which batches are kept")

    def work() -> Batch:
        settings, store = services.settings, services.store
        ports = RetryPorts(
            store,
            services.files,
            services.workspace,
            services.clock,
            services.randomness,
            settings.completion_windows,
            find_room(batch.project_id, settings.max_stored_bytes, store, services.clock()),
            allowed_hosts(settings),
        )
        key = idempotency.claim_key(BATCHES)
        return retry_batch(batch, params, ports, claim_key=key, on_repeat=idempotency.mark_replayed)

    try:
        return present_batch(await to_thread.run_sync(work, limiter=services.disk))
    except NotFound:
        return _explain_loss(batch, f"its input file {batch.input_file_id} was deleted or has expired")


def _explain_loss(batch: Batch, reason: str) -> Response:
    message = f"The lines of batch {batch.id} cannot be read again: {reason}. Upload them as a new file."
    return envelope(404, message, param="input_file_id", code=INPUT_GONE)
