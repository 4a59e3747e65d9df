"""The OpenAI-compatible API as an ASGI app: routes, error table, request trace. Built by server.py."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from fastapi import FastAPI

import api_shim.batches
import api_shim.files
import api_shim.health
import api_shim.models
import api_shim.preflight
import api_shim.results
import api_shim.retry
import api_shim.uploads
import api_shim.webhook_endpoints
from api_shim.auth import KeyGate
from api_shim.deps import Services
from api_shim.errors import error_responses, install_error_handlers
from api_shim.middleware import RequestTrace
from api_shim.schemas import ErrorEnvelope
from vllm_batch_dagster.composition import build_model_facts
from vllm_batch_dagster.core.creation import Randomness
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore, ModelCatalog, Workspace
from vllm_batch_dagster.core.preflight import ModelFacts
from vllm_batch_dagster.settings import Settings

UPLOAD_END_SECONDS = 10


def create_app(
    settings: Settings,
    store: BatchStore,
    files: FileStore,
    workspace: Workspace,
    catalog: ModelCatalog,
    clock: Clock,
    *,
    randomness: Randomness = secrets.token_bytes,
    facts: ModelFacts | None = None,
) -> FastAPI:
    """Return the app over the given adapters. `randomness` makes the ids; `facts` are those of the settings if not
    given."""
    app = FastAPI(
        title=api_shim.health.PACKAGE,
        version=api_shim.health.package_version(),
        lifespan=_end_uploads,
        redirect_slashes=False,  # a redirect would be an answer without the envelope
        responses={
            **error_responses(401, 429),
            "default": {"model": ErrorEnvelope, "description": "OpenAI's error envelope"},
        },
    )
    app.state.services = Services(
        settings=settings,
        store=store,
        files=files,
        workspace=workspace,
        catalog=catalog,
        facts=facts or build_model_facts(settings),
        clock=clock,
        randomness=randomness,
        started_at=int(clock()),
    )
    install_error_handlers(app)
    app.add_middleware(KeyGate, services=app.state.services)
    app.add_middleware(RequestTrace)  # the outermost: refusals of the gate have a request id too
    for module in (
        api_shim.files,
        api_shim.uploads,
        api_shim.batches,
        api_shim.preflight,
        api_shim.results,
        api_shim.retry,
        api_shim.webhook_endpoints,
        api_shim.models,
        api_shim.health,
    ):
        app.include_router(module.router)
    return app


@asynccontextmanager
async def _end_uploads(app: FastAPI) -> AsyncIterator[None]:
    """Let cancelled uploads remove their partial files before the process ends."""
    yield
    with anyio.move_on_after(UPLOAD_END_SECONDS):
        await app.state.services.arrivals.wait_idle()
