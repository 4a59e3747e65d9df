"""/v1/webhook_endpoints and /v1/webhook_event_types: who is told when a batch ends. The rules are in core/webhooks.py,
the attempts in stages/webhooks.py."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Query

from api_shim.deps import CursorDep, JsonDep, ProjectDep, Services, ServicesDep, unknown_cursor
from api_shim.errors import error_responses
from api_shim.retry import read_optional_object
from api_shim.schemas import request_body
from api_shim.webhook_schemas import (
    CREATE_ENDPOINT_SCHEMA,
    ROTATE_SECRET_SCHEMA,
    TEST_ENDPOINT_SCHEMA,
    UPDATE_ENDPOINT_SCHEMA,
    DeletedWebhookEndpoint,
    WebhookEndpointList,
    WebhookEndpointObject,
    WebhookEndpointWithSecret,
    WebhookEventTypeList,
    WebhookTestResult,
    present_endpoint,
    present_endpoints,
    present_with_secret,
)
from vllm_batch_dagster.composition import allowed_hosts, build_webhook_sender
from vllm_batch_dagster.core.creation import is_storable
from vllm_batch_dagster.core.errors import InvalidInput, NotFound
from vllm_batch_dagster.core.webhook_params import read_endpoint_params, read_keep_old, read_tested_type
from vllm_batch_dagster.core.webhooks import (
    ENDPOINT_KIND,
    EVENT_TYPES,
    Outcome,
    WebhookEndpoint,
    make_endpoint,
    new_signing_secret,
)
from vllm_batch_dagster.stages.webhooks import WebhookPorts, send_sample

UNREACHABLE = "webhook_endpoint_unreachable"
JSON = "application/json"

router = APIRouter(prefix="/v1", tags=["webhooks"])


def get_endpoint(webhook_endpoint_id: str, services: ServicesDep, project_id: ProjectDep) -> WebhookEndpoint:
    if not is_storable(webhook_endpoint_id):
        raise NotFound(ENDPOINT_KIND, webhook_endpoint_id)
    return services.store.webhooks.get(webhook_endpoint_id, project_id=project_id)


EndpointDep = Annotated[WebhookEndpoint, Depends(get_endpoint)]


@router.post(
    "/webhook_endpoints",
    responses=error_responses(400, 413, 415),
    openapi_extra=request_body(JSON, CREATE_ENDPOINT_SCHEMA),
)
def create_endpoint(params: JsonDep, services: ServicesDep, project_id: ProjectDep) -> WebhookEndpointWithSecret:
    wanted = read_endpoint_params(params, allowed_hosts(services.settings), is_new=True)
    endpoint = make_endpoint(wanted, project_id, services.randomness, int(services.clock()))
    services.store.webhooks.add(endpoint)
    return present_with_secret(endpoint)


@router.get("/webhook_endpoints", responses=error_responses(400))
def list_endpoints(
    services: ServicesDep,
    project_id: ProjectDep,
    after: CursorDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> WebhookEndpointList:
    try:
        return present_endpoints(services.store.webhooks.list(after=after, limit=limit, project_id=project_id))
    except NotFound as missing:
        raise unknown_cursor(after) from missing


@router.get("/webhook_endpoints/{webhook_endpoint_id}", responses=error_responses(404))
def retrieve_endpoint(endpoint: EndpointDep) -> WebhookEndpointObject:
    return present_endpoint(endpoint)


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}",
    responses=error_responses(400, 404, 413, 415),
    openapi_extra=request_body(JSON, UPDATE_ENDPOINT_SCHEMA),
)
def update_endpoint(endpoint: EndpointDep, params: JsonDep, services: ServicesDep) -> WebhookEndpointObject:
    changes = read_endpoint_params(params, allowed_hosts(services.settings), is_new=False)
    return present_endpoint(services.store.webhooks.change(endpoint.id, changes, int(services.clock())))


@router.delete("/webhook_endpoints/{webhook_endpoint_id}", responses=error_responses(404))
def delete_endpoint(endpoint: EndpointDep, services: ServicesDep) -> DeletedWebhookEndpoint:
    services.store.webhooks.delete(endpoint.id)
    return DeletedWebhookEndpoint(id=endpoint.id)


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
    responses=error_responses(400, 404, 413, 415),
    openapi_extra={"requestBody": {"required": False, "content": {JSON: {"schema": ROTATE_SECRET_SCHEMA}}}},
)
def rotate_secret(
    endpoint: EndpointDep,
    params: Annotated[dict[str, object], Depends(read_optional_object)],
    services: ServicesDep,
) -> WebhookEndpointWithSecret:
    keep_old = read_keep_old(params)
    new, now = new_signing_secret(services.randomness), int(services.clock())
    return present_with_secret(services.store.webhooks.rotate(endpoint.id, new, now, keep_old=keep_old))


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/test",
    responses=error_responses(400, 404, 413, 415),
    openapi_extra=request_body(JSON, TEST_ENDPOINT_SCHEMA),
)
async def send_test(endpoint: EndpointDep, params: JsonDep, services: ServicesDep) -> WebhookTestResult:
    kind = read_tested_type(params)
    outcome = await to_thread.run_sync(_send_sample, endpoint, kind, services, limiter=services.webhook_tests)
    if outcome.status is None:
        raise InvalidInput(
            f"The test event got no answer: {outcome.reason}. Check the URL of the endpoint.",
            param="url",
            code=UNREACHABLE,
        )
    return WebhookTestResult(webhook_endpoint_id=endpoint.id, event_type=kind, status_code=outcome.status)


@router.get("/webhook_event_types")
def list_event_types() -> WebhookEventTypeList:
    return WebhookEventTypeList(data=list(EVENT_TYPES))


def _send_sample(endpoint: WebhookEndpoint, kind: str, services: Services) -> Outcome:
    sender = build_webhook_sender(services.settings)
    return send_sample(endpoint, kind, WebhookPorts(services.store, sender, services.clock, services.randomness))
