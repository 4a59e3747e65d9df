"""POST and GET of /v1/batches, and cancel. The rules are in stages/intake.py and core/creation.py."""

from typing import Annotated

from fastapi import APIRouter, Query

from api_shim.deps import BatchDep, CursorDep, JsonDep, ProjectDep, ServicesDep, unknown_cursor
from api_shim.errors import error_responses
from api_shim.idempotency import IDEMPOTENCY_PARAMETER, IdempotencyDep
from api_shim.presenters import present_batch, present_batches
from api_shim.schemas import CREATE_BATCH_SCHEMA, BatchList, BatchObject, request_body
from vllm_batch_dagster.composition import allowed_hosts
from vllm_batch_dagster.core.claims import BATCHES
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.stages.intake import cancel_batch, create_batch

router = APIRouter(prefix="/v1/batches", tags=["batches"])


@router.post(
    "",
    responses=error_responses(400, 409, 413, 415),
    openapi_extra=request_body("application/json", CREATE_BATCH_SCHEMA) | IDEMPOTENCY_PARAMETER,
)
def submit_batch(
    params: JsonDep, services: ServicesDep, project_id: ProjectDep, idempotency: IdempotencyDep
) -> BatchObject:
    batch = create_batch(
        params,
        services.store,
        services.clock,
        services.randomness,
        project_id=project_id,
        windows=services.settings.completion_windows,
        webhook_hosts=allowed_hosts(services.settings),
        claim_key=idempotency.claim_key(BATCHES),
        on_repeat=idempotency.mark_replayed,
    )
    return present_batch(batch)


@router.get("", responses=error_responses(400))
def list_batches(
    services: ServicesDep,
    project_id: ProjectDep,
    after: CursorDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    try:
        page = services.store.batches.list(after=after, limit=limit, project_id=project_id)
    except NotFound as missing:
        raise unknown_cursor(after) from missing
    return present_batches(page, services.pauses.standing(), services.clock())


@router.get("/{batch_id}", responses=error_responses(404))
def retrieve_batch(batch: BatchDep, services: ServicesDep) -> BatchObject:
    pauses = () if batch.is_terminal else services.pauses.standing()
    return present_batch(batch, pauses, services.clock())


@router.post("/{batch_id}/cancel", responses=error_responses(404, 409))
def cancel(batch: BatchDep, services: ServicesDep) -> BatchObject:
    """The body is not read: the openai client announces JSON and sends none (contract C.5)."""
    return present_batch(cancel_batch(batch.id, services.store, services.clock))
