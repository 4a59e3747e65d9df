"""GET /v1/batches/{id}/results, the seed's short cut: the bytes of the output file once there is one."""

from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse

from api_shim.deps import BatchDep, ServicesDep
from api_shim.errors import envelope, error_responses
from api_shim.files import stream_contents
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.stages.intake import find_file

NO_RESULTS = "results_not_ready"
NO_OUTPUT = "no_output_file"

router = APIRouter(prefix="/v1/batches", tags=["batches"])


@router.get("/{batch_id}/results", response_class=StreamingResponse, responses=error_responses(404))
def download_results(batch: BatchDep, services: ServicesDep) -> Response:
    if batch.output_file_id is None:
        return _explain_absence(batch)
    file = find_file(batch.output_file_id, services.store, services.clock())
    return stream_contents(file, services, media_type="application/jsonl")


def _explain_absence(batch: Batch) -> Response:
    """404 that says the status. Error lines are no substitute: whoever reads results expects answers."""
    if not batch.is_terminal:
        message = f"Batch {batch.id} has no results yet: its status is '{batch.status.value}'. Ask later."
        return envelope(404, message, code=NO_RESULTS)
    reason = f"Batch {batch.id} is '{batch.status.value}' and no request of it succeeded."
    if batch.error_file_id is not None:
        reason += f" The reasons are in its error file: GET /v1/files/{batch.error_file_id}/content"
    elif batch.errors:
        reason += " Its input did not pass validation: see 'errors' in GET /v1/batches/" + batch.id
    return envelope(404, reason, code=NO_OUTPUT)
