"""Webhook endpoints on the wire, exactly OpenAI's (contract F.5). A secret is in one object only: create and rotate."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from vllm_batch_dagster.core.creation import MAX_METADATA_VALUE
from vllm_batch_dagster.core.models import Page
from vllm_batch_dagster.core.webhook_params import KEEP_OLD, MAX_NAME
from vllm_batch_dagster.core.webhooks import EVENT_TYPES, WebhookEndpoint, secret_hint


class WebhookEndpointObject(BaseModel):
    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str


class WebhookEndpointWithSecret(WebhookEndpointObject):
    signing_secret: str


class WebhookEndpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[WebhookEndpointObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedWebhookEndpoint(BaseModel):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class WebhookTestResult(BaseModel):
    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class WebhookEventTypeList(BaseModel):
    object: Literal["list"] = "list"
    data: list[str]


def present_endpoint(endpoint: WebhookEndpoint) -> WebhookEndpointObject:
    return WebhookEndpointObject(**_shown(endpoint))


def present_with_secret(endpoint: WebhookEndpoint) -> WebhookEndpointWithSecret:
    return WebhookEndpointWithSecret(**_shown(endpoint), signing_secret=endpoint.secret.current)


def present_endpoints(page: Page[WebhookEndpoint]) -> WebhookEndpointList:
    return WebhookEndpointList(
        data=[present_endpoint(endpoint) for endpoint in page.data],
        first_id=page.data[0].id if page.data else None,
        last_id=page.data[-1].id if page.data else None,
        has_more=page.has_more,
    )


def _shown(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "created_at": endpoint.created_at,
        "updated_at": endpoint.updated_at,
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.event_types),
        "signing_secret_hint": secret_hint(endpoint.secret.current),
    }


# Request bodies, for the OpenAPI document; core/webhooks.py checks them.
_EVENT_TYPE: dict[str, Any] = {"type": "string", "enum": list(EVENT_TYPES)}
_PROPERTIES: dict[str, Any] = {
    "name": {"type": "string", "minLength": 1, "maxLength": MAX_NAME},
    "url": {"type": "string", "format": "uri", "maxLength": MAX_METADATA_VALUE},
    "event_types": {"type": "array", "items": _EVENT_TYPE, "minItems": 1},
}


def _object(properties: dict[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


CREATE_ENDPOINT_SCHEMA = _object(_PROPERTIES, tuple(_PROPERTIES))
UPDATE_ENDPOINT_SCHEMA = _object(_PROPERTIES)
ROTATE_SECRET_SCHEMA = _object({KEEP_OLD: {"type": "boolean", "default": False}})
TEST_ENDPOINT_SCHEMA = _object({"event_type": _EVENT_TYPE}, ("event_type",))
