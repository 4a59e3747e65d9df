"""Rules for webhook endpoints, and for the `webhook_url` of a batch: parameters in, checked values or InvalidInput out.

Called by api_shim/webhook_endpoints.py and when a batch is made. Pure.
"""

from collections.abc import Mapping, Sequence

from vllm_batch_dagster.core.creation import (
    MAX_METADATA_VALUE,
    check_text,
    missing_parameter,
    unsupported_value,
    wrong_type,
)
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.webhook_urls import NO_HOSTS, AllowedHosts, read_webhook_url
from vllm_batch_dagster.core.webhooks import EVENT_TYPES, METADATA_KEY, EndpointParams

MAX_NAME = 256
KEEP_OLD = "keep_old_secret_active_for_24_hours"


def read_endpoint_params(
    params: Mapping[str, object], hosts: AllowedHosts = NO_HOSTS, *, is_new: bool
) -> EndpointParams:
    """Check the parameters of a new endpoint, or of an update. Unknown ones are ignored. Raises InvalidInput."""
    for name in ("name", "url", "event_types"):
        if is_new and name not in params:
            raise missing_parameter(name)
    url = _read_text(params, "url", MAX_METADATA_VALUE)
    return EndpointParams(
        name=_read_name(params),
        url=None if url is None else read_webhook_url(url, "url", hosts),
        event_types=_read_event_types(params["event_types"]) if "event_types" in params else None,
    )


def read_tested_type(params: Mapping[str, object]) -> str:
    """Return the `event_type` of a test. Raises InvalidInput."""
    if "event_type" not in params:
        raise missing_parameter("event_type")
    return _read_event_type(params["event_type"], "event_type")


def read_keep_old(params: Mapping[str, object]) -> bool:
    """Return whether a rotation keeps the old secret for a day; it does not unless asked to. Raises InvalidInput."""
    value = params.get(KEEP_OLD, False)
    if not isinstance(value, bool):
        raise wrong_type(KEEP_OLD, "a boolean", value)
    return value


def check_batch_webhook(metadata: Mapping[str, str] | None, hosts: AllowedHosts = NO_HOSTS) -> None:
    """Raises InvalidInput when the batch's `metadata.webhook_url` cannot be a target."""
    if metadata and METADATA_KEY in metadata:
        read_webhook_url(metadata[METADATA_KEY], f"metadata.{METADATA_KEY}", hosts)


def _read_name(params: Mapping[str, object]) -> str | None:
    name = _read_text(params, "name", MAX_NAME)
    if name is not None and not name.strip():
        raise InvalidInput("Invalid 'name': write at least one visible character.", param="name", code="invalid_value")
    return name


def _read_text(params: Mapping[str, object], name: str, longest: int) -> str | None:
    if name not in params:
        return None
    value = params[name]
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    check_text(name, value, longest)
    return value


def _read_event_types(value: object) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise wrong_type("event_types", "an array", value)
    if not value:
        raise InvalidInput(
            "Invalid 'event_types': name at least one type of event.", param="event_types", code="empty_array"
        )
    return tuple(dict.fromkeys(_read_event_type(item, f"event_types[{at}]") for at, item in enumerate(value)))


def _read_event_type(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(param, "a string", value)
    if value not in EVENT_TYPES:
        raise unsupported_value(param, value, EVENT_TYPES)
    return value
