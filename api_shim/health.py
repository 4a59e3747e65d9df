"""GET /health for supervisors, GET / for a person with curl. Neither is OpenAI's."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from api_shim.deps import PROJECT, ServicesDep
from api_shim.errors import envelope, error_responses
from api_shim.presenters import present_counts
from api_shim.schemas import HealthObject, ServerStatus
from vllm_batch_dagster.core.models import RequestCounts
from vllm_batch_dagster.settings import Settings

PACKAGE = "vllm-batch-dagster"
WILDCARD_HOSTS = frozenset({"0.0.0.0", "::", ""})

router = APIRouter(tags=["server"])


@router.get("/health", response_model=HealthObject, responses=error_responses(503))
def check_health(services: ServicesDep) -> Response:
    """200 when the batch store answers a read, else 503."""
    try:
        services.store.batches.list(limit=1)
    except Exception as failure:  # noqa: BLE001 - whatever the driver raises, the answer is the same
        return envelope(503, f"The batch store does not answer: {failure}", code="store_unavailable")
    return JSONResponse(HealthObject(version=package_version()).model_dump())


@router.get("/")
def show_status(request: Request, services: ServicesDep) -> ServerStatus:
    """Counts are those of the caller's project; a stranger to a server with keys gets none."""
    status = ServerStatus(name=PACKAGE, version=package_version(), docs="/docs")
    project_id = request.scope.get(PROJECT)
    if project_id is None:
        return status
    mine = [batch for batch in services.store.batches.open() if batch.project_id == project_id]
    open_batches = [batch for batch in mine if not batch.is_terminal]
    counts = sum((batch.counts for batch in open_batches), RequestCounts())
    return status.model_copy(
        update={
            "dagster_url": dagster_url(services.settings),
            "open_batches": len(open_batches),
            "request_counts": present_counts(counts),
        }
    )


def package_version() -> str:
    """The installed version, or `source` when the code runs from a tree that is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "source"


def dagster_url(settings: Settings) -> str:
    """Where a person on this machine finds the Dagster UI."""
    host = "127.0.0.1" if settings.dagster_host in WILDCARD_HOSTS else settings.dagster_host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.dagster_port}"
