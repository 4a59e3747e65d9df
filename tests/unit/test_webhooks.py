"""Webhooks without a network: bodies, secrets, the pauses between attempts, the parameters of endpoints."""

import base64
import itertools
import json
import secrets
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.webhook_params import (
    check_batch_webhook,
    read_endpoint_params,
    read_keep_old,
    read_tested_type,
)
from vllm_batch_dagster.core.webhooks import (
    EVENT_TYPES,
    EndpointParams,
    SigningSecret,
    WebhookEndpoint,
    WebhookTarget,
    batch_target,
    change_endpoint,
    endpoint_target,
    event_body,
    is_delivered,
    make_endpoint,
    new_signing_secret,
    next_attempt,
    rotate_endpoint,
    secret_hint,
    webhook_id,
)

NOW = 1_700_000_000
HOUR, DAY = 3600, 86_400
NEW: dict[str, Any] = {"name": "mine", "url": "https://example.com/hook", "event_types": ["batch.completed"]}

event_ids = st.text("0123456789abcdef", min_size=32, max_size=32).map("evt_{}".format)


def an_endpoint() -> WebhookEndpoint:
    return make_endpoint(read_endpoint_params(NEW, is_new=True), "team-a", secrets.token_bytes, NOW)


def test_the_body_is_openais() -> None:
    body = event_body("evt_1", "batch.failed", NOW, "batch_1")
    assert json.loads(body) == {
        "object": "event",
        "id": "evt_1",
        "type": "batch.failed",
        "created_at": NOW,
        "data": {"id": "batch_1"},
    }


def test_attempts_at_one_event_share_an_id() -> None:
    assert webhook_id("evt_abc") == "wh_abc"


@pytest.mark.parametrize(("status", "expected"), [(200, True), (204, True), (299, True), (199, False), (302, False)])
def test_which_answers_deliver(status: int, expected: bool) -> None:
    assert is_delivered(status) is expected


def attempts_of(event_id: str, seconds: float = 0.0) -> list[float]:
    """When attempts begin if each fails after `seconds`."""
    times = [float(NOW)]
    while (following := next_attempt(event_id, len(times), NOW, times[-1] + seconds)) is not None:
        times.append(following)
    return times


@given(event_ids, st.floats(0, 10))
def test_attempts_go_on_for_three_days(event_id: str, seconds: float) -> None:
    times = attempts_of(event_id, seconds)
    pauses = [after - before - seconds for before, after in itertools.pairwise(times)]

    assert 4 <= pauses[0] <= 6.001
    assert times[-1] == NOW + 72 * HOUR
    assert max(pauses) <= 4 * HOUR * 1.2 + 1
    assert 20 <= len(times) <= 40
    for before, after in itertools.pairwise(pauses[:-1]):
        assert after >= min(before * 4 / 3 - 0.001, 4 * HOUR * 0.8 - 1)


def test_the_jitter_follows_from_the_event_and_the_attempt() -> None:
    first = {next_attempt(f"evt_{number}", 1, NOW, NOW) for number in range(50)}
    assert len(first) == 50
    assert next_attempt("evt_1", 1, NOW, NOW) == next_attempt("evt_1", 1, NOW, NOW)


@given(event_ids, st.integers(1, 10_000), st.floats(0, 100 * DAY))
def test_the_next_attempt_lies_ahead_and_before_the_end(event_id: str, attempts: int, age: float) -> None:
    following = next_attempt(event_id, attempts, NOW, NOW + age)
    assert (following is None) == (age >= 72 * HOUR)
    if following is not None:
        assert NOW + age < following <= NOW + 72 * HOUR


def test_a_secret_is_what_the_client_decodes() -> None:
    secret = new_signing_secret(secrets.token_bytes)
    assert secret.startswith("whsec_")
    assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32


def test_a_hint_tells_two_secrets_apart_and_none_of_them() -> None:
    one = new_signing_secret(lambda count: bytes(range(count)))
    other = new_signing_secret(lambda count: bytes(range(1, count + 1)))
    assert secret_hint(one) == f"whsec_...{one[-5:-1]}"
    assert secret_hint(other) != secret_hint(one)
    assert len(secret_hint(one)) == len("whsec_...") + 4


def test_a_rotation_ends_the_old_secret_at_once_or_a_day_later() -> None:
    secret = SigningSecret("old")
    assert secret.rotated("new", NOW, keep_old=False).active(NOW) == ("new",)

    both = secret.rotated("new", NOW, keep_old=True)
    assert both.active(NOW) == ("new", "old")
    assert both.active(NOW + DAY - 1) == ("new", "old")
    assert both.active(NOW + DAY) == ("new",)
    assert both.rotated("newest", NOW + 1, keep_old=True).active(NOW + 2) == ("newest", "new")


def test_nothing_prints_a_secret() -> None:
    endpoint = rotate_endpoint(an_endpoint(), "whsec_new", NOW + 1, keep_old=True)
    assert "whsec_" not in repr(endpoint)
    assert "whsec_" not in str(endpoint.secret)


def test_an_endpoint_is_made_of_its_parameters() -> None:
    endpoint = an_endpoint()
    assert endpoint.id.startswith("we_")
    assert (endpoint.name, endpoint.url, endpoint.event_types) == ("mine", NEW["url"], ("batch.completed",))
    assert (endpoint.project_id, endpoint.created_at, endpoint.updated_at) == ("team-a", NOW, NOW)


def test_a_change_moves_the_time_only_when_something_differs() -> None:
    endpoint = an_endpoint()
    same = change_endpoint(endpoint, EndpointParams(name="mine", url=endpoint.url), NOW + 5)
    assert same == endpoint
    changed = change_endpoint(endpoint, EndpointParams(name="other"), NOW + 5)
    assert (changed.name, changed.url, changed.updated_at) == ("other", endpoint.url, NOW + 5)
    assert rotate_endpoint(endpoint, "whsec_x", NOW + 7, keep_old=False).updated_at == NOW + 7


def test_event_types_are_named_once_in_their_order() -> None:
    types = ["batch.failed", "batch.completed", "batch.failed"]
    params = read_endpoint_params({**NEW, "event_types": types, "unknown": 1}, is_new=True)
    assert params.event_types == ("batch.failed", "batch.completed")


def test_an_update_names_what_it_changes() -> None:
    assert read_endpoint_params({"name": "x"}, is_new=False) == EndpointParams(name="x")


@pytest.mark.parametrize(
    ("params", "param", "code"),
    [
        ({"name": ...}, "name", "missing_required_parameter"),
        ({"url": ...}, "url", "missing_required_parameter"),
        ({"event_types": ...}, "event_types", "missing_required_parameter"),
        ({"name": 1}, "name", "invalid_type"),
        ({"name": None}, "name", "invalid_type"),
        ({"name": " "}, "name", "invalid_value"),
        ({"name": "a" * 257}, "name", "string_above_max_length"),
        ({"name": "a\0"}, "name", "invalid_value"),
        ({"url": 1}, "url", "invalid_type"),
        ({"url": "http://example.com"}, "url", "invalid_webhook_url"),
        ({"event_types": "batch.failed"}, "event_types", "invalid_type"),
        ({"event_types": []}, "event_types", "empty_array"),
        ({"event_types": [1]}, "event_types[0]", "invalid_type"),
        ({"event_types": ["batch.failed", "response.completed"]}, "event_types[1]", "invalid_value"),
    ],
)
def test_wrong_parameters_of_an_endpoint(params: dict[str, Any], param: str, code: str) -> None:
    merged = {name: value for name, value in {**NEW, **params}.items() if value is not ...}
    with pytest.raises(InvalidInput) as caught:
        read_endpoint_params(merged, is_new=True)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_parameters_of_a_test_and_of_a_rotation() -> None:
    assert [read_tested_type({"event_type": kind}) for kind in EVENT_TYPES] == list(EVENT_TYPES)
    assert read_keep_old({}) is False
    assert read_keep_old({"keep_old_secret_active_for_24_hours": True}) is True
    for read, wrong in (
        (read_tested_type, {}),
        (read_tested_type, {"event_type": "batch.begun"}),
        (read_keep_old, {"keep_old_secret_active_for_24_hours": "yes"}),
    ):
        with pytest.raises(InvalidInput):
            read(wrong)


def test_a_batch_may_name_a_target() -> None:
    check_batch_webhook(None)
    check_batch_webhook({"other": "http://10.0.0.1"})
    check_batch_webhook({"webhook_url": "https://example.com/x"})
    assert batch_target({"webhook_url": "https://example.com/x"}) == WebhookTarget(
        "webhook:metadata", "https://example.com/x"
    )
    assert batch_target(None) is None
    with pytest.raises(InvalidInput) as caught:
        check_batch_webhook({"webhook_url": "https://10.0.0.1/x"})
    assert caught.value.param == "metadata.webhook_url"


def test_the_target_of_an_endpoint() -> None:
    endpoint = an_endpoint()
    assert endpoint_target(endpoint) == WebhookTarget(f"webhook:{endpoint.id}", endpoint.url)
