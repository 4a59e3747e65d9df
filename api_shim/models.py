"""GET /v1/models: the names that requests of a batch may use, from the catalogue or the servers of ENGINE_URL."""

from fastapi import APIRouter

from api_shim.deps import ServicesDep
from api_shim.errors import error_responses
from api_shim.presenters import present_models
from api_shim.schemas import ModelList

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", responses=error_responses(503))
def list_models(services: ServicesDep) -> ModelList:
    return present_models(services.catalog.all(), services.started_at)
