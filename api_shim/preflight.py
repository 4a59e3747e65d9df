"""POST /v1/batches/validate: what a batch of these parameters would meet, without making it. Not OpenAI's.

The walk over the file is stages/preflight.py. It runs on a thread, few at a time, and starts no engine.
"""

from anyio import to_thread
from fastapi import APIRouter

from api_shim.deps import JsonDep, ProjectDep, ServicesDep
from api_shim.errors import error_responses
from api_shim.preflight_schemas import BatchValidation, present_preflight
from api_shim.schemas import CREATE_BATCH_SCHEMA, request_body
from vllm_batch_dagster.core.creation import make_batch, new_batch_id, read_batch_params
from vllm_batch_dagster.stages.measuring import PreflightBudget, PreflightPorts
from vllm_batch_dagster.stages.preflight import inspect_batch
from vllm_batch_dagster.stages.validation import ValidationLimits

router = APIRouter(prefix="/v1/batches", tags=["batches"])


@router.post(
    "/validate",
    responses=error_responses(400, 413, 415, 503),
    openapi_extra=request_body("application/json", CREATE_BATCH_SCHEMA),
)
async def validate_batch(params: JsonDep, services: ServicesDep, project_id: ProjectDep) -> BatchValidation:
    settings = services.settings
    checked = read_batch_params(params, settings.completion_windows)
    batch = make_batch(checked, new_batch_id(services.randomness), int(services.clock()), project_id)
    limits = ValidationLimits(
        chunk_size=settings.chunk_size,
        chunk_slots=settings.chunk_slots,
        max_requests=settings.max_requests_per_batch,
        max_errors=settings.max_validation_errors,
        max_queued_lines=settings.max_queued_lines,
        mode=settings.validation_mode,
    )
    ports = PreflightPorts(services.store, services.files, services.catalog, services.facts, services.clock)
    budget = PreflightBudget(listed=settings.max_validation_errors)
    found = await to_thread.run_sync(inspect_batch, batch, ports, limits, budget, limiter=services.preflights)
    return present_preflight(batch, found, settings.max_validation_errors)
