"""/v1/webhook_endpoints through the official client in strict mode, and the `webhook_url` of a batch."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.webhooks import WebhookEndpoint, WebhookEndpointWithSecret
from starlette.testclient import TestClient

from tests.conformance.receiver import Receiver
from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.settings import Settings

TYPES: Any = ["batch.completed", "batch.failed"]
URL = "https://receiver.invalid/hook"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhook_allowed_hosts": "127.0.0.1"})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def endpoint(sdk: OpenAI) -> WebhookEndpointWithSecret:
    return sdk.webhooks.create(name="mine", url=URL, event_types=TYPES)


def test_create(endpoint: WebhookEndpointWithSecret, clock: FixedClock) -> None:
    assert endpoint.id.startswith("we_")
    assert (endpoint.name, endpoint.url, endpoint.event_types) == ("mine", URL, TYPES)
    assert endpoint.created_at == endpoint.updated_at == int(clock())
    assert endpoint.signing_secret.startswith("whsec_")


def test_only_create_and_rotate_show_a_secret(sdk: OpenAI, endpoint: WebhookEndpointWithSecret) -> None:
    raw = sdk.webhooks.with_raw_response
    answers = [
        raw.retrieve(endpoint.id),
        raw.list(),
        raw.update(endpoint.id, name="other"),
        raw.delete(endpoint.id),
    ]
    assert all('signing_secret"' not in answer.text for answer in answers)
    assert all(endpoint.signing_secret[6:40] not in answer.text for answer in answers)
    hint = json.loads(answers[0].text)["signing_secret_hint"]
    assert hint == f"whsec_...{endpoint.signing_secret.rstrip('=')[-4:]}"


def test_retrieve_and_update(sdk: OpenAI, endpoint: WebhookEndpointWithSecret, clock: FixedClock) -> None:
    before = sdk.webhooks.retrieve(endpoint.id)
    assert type(before) is WebhookEndpoint
    clock.advance(5)
    assert sdk.webhooks.update(endpoint.id, name="mine") == before

    after = sdk.webhooks.update(endpoint.id, url=f"{URL}/2", event_types=["batch.expired"])
    assert (after.name, after.url, after.event_types) == ("mine", f"{URL}/2", ["batch.expired"])
    assert (after.created_at, after.updated_at) == (before.created_at, before.created_at + 5)
    assert sdk.webhooks.retrieve(endpoint.id) == after


def test_list_pages_newest_first(sdk: OpenAI, clock: FixedClock) -> None:
    made = []
    for number in range(3):
        made.append(sdk.webhooks.create(name=f"{number}", url=URL, event_types=TYPES).id)
        clock.advance(1)
    assert [each.id for each in sdk.webhooks.list(limit=1)] == made[::-1]
    page = sdk.webhooks.list(limit=2, after=made[2])
    assert ([each.id for each in page.data], page.has_more) == ([made[1], made[0]], False)


def test_delete(sdk: OpenAI, endpoint: WebhookEndpointWithSecret) -> None:
    gone = sdk.webhooks.delete(endpoint.id)
    assert (gone.id, gone.deleted, gone.object) == (endpoint.id, True, "webhook_endpoint.deleted")
    for call in (sdk.webhooks.retrieve, sdk.webhooks.delete, sdk.webhooks.rotate_secret):
        with pytest.raises(openai.NotFoundError, match="No webhook endpoint found with id"):
            call(endpoint.id)


def test_rotate(sdk: OpenAI, endpoint: WebhookEndpointWithSecret, clock: FixedClock) -> None:
    clock.advance(7)
    rotated = sdk.webhooks.rotate_secret(endpoint.id)
    assert rotated.signing_secret != endpoint.signing_secret
    assert rotated.updated_at == endpoint.created_at + 7
    kept = sdk.webhooks.rotate_secret(endpoint.id, keep_old_secret_active_for_24_hours=True)
    assert kept.signing_secret not in (rotated.signing_secret, endpoint.signing_secret)


def test_rotate_without_a_body(client: TestClient, endpoint: WebhookEndpointWithSecret) -> None:
    answer = client.post(f"/v1/webhook_endpoints/{endpoint.id}/rotate_secret")
    assert answer.status_code == 200
    assert answer.json()["signing_secret"] != endpoint.signing_secret


def test_event_types(sdk: OpenAI) -> None:
    assert sdk.webhooks.event_types.list().data == [
        "batch.completed",
        "batch.failed",
        "batch.cancelled",
        "batch.expired",
    ]


def test_a_test_event_arrives_signed(
    sdk: OpenAI, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, clock: FixedClock
) -> None:
    endpoint = sdk.webhooks.create(name="mine", url=f"{receiver.url}/empty", event_types=TYPES)
    result = sdk.webhooks.test(endpoint.id, event_type="batch.expired")
    assert (result.webhook_endpoint_id, result.event_type) == (endpoint.id, "batch.expired")
    assert (result.status_code, result.success) == (204, True)

    (delivery,) = receiver.got("empty")
    monkeypatch.setattr("openai.lib._webhooks.time.time", lambda: int(clock()))
    event = sdk.webhooks.unwrap(delivery.body, delivery.headers, secret=endpoint.signing_secret)
    assert event.type == "batch.expired"


def test_the_status_of_a_test_is_the_receivers(sdk: OpenAI, receiver: Receiver) -> None:
    for name, status in (("error", 500), ("redirect", 302)):
        endpoint = sdk.webhooks.create(name=name, url=f"{receiver.url}/{name}", event_types=TYPES)
        assert sdk.webhooks.test(endpoint.id, event_type="batch.failed").status_code == status


def test_a_test_without_an_answer_is_refused_once(sdk: OpenAI, endpoint: WebhookEndpointWithSecret) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.webhooks.test(endpoint.id, event_type="batch.failed")
    assert (caught.value.param, caught.value.code) == ("url", "webhook_endpoint_unreachable")
    assert "receiver.invalid cannot be resolved" in caught.value.message


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"url": "http://receiver.example/"}, "url"),
        ({"url": "https://169.254.169.254/latest/meta-data"}, "url"),
        ({"url": "https://2130706433/"}, "url"),
        ({"event_types": ["response.completed"]}, "event_types[0]"),
        ({"event_types": []}, "event_types"),
        ({"name": ""}, "name"),
    ],
)
def test_what_is_refused(sdk: OpenAI, endpoint: WebhookEndpointWithSecret, params: Any, param: str) -> None:
    for call in (
        lambda: sdk.webhooks.create(**{"name": "mine", "url": URL, "event_types": TYPES, **params}),
        lambda: sdk.webhooks.update(endpoint.id, **params),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.param == param
    assert sdk.webhooks.retrieve(endpoint.id).url == URL
    assert len(sdk.webhooks.list().data) == 1


@pytest.mark.parametrize("url", ["http://10.0.0.1/x", "https://localhost.example:0/", "https://[::1]/", "not a url"])
def test_a_batch_with_a_url_that_cannot_be_called_is_refused(client: TestClient, url: str) -> None:
    params = {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"}
    answer = client.post("/v1/batches", json={**params, "metadata": {"webhook_url": url}})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("metadata.webhook_url", "invalid_webhook_url")
    assert client.get("/v1/batches").json()["data"] == []


def test_a_batch_may_name_a_url(create: Callable[..., dict[str, Any]], receiver: Receiver) -> None:
    for url in (URL, f"{receiver.url}/ok"):
        assert create(metadata={"webhook_url": url})["metadata"] == {"webhook_url": url}


def test_a_retry_is_held_to_the_same_rules(client: TestClient, lead_to: Callable[[str], str]) -> None:
    batch_id = lead_to("failed")
    for url, param in (("http://10.0.0.1/x", "metadata.webhook_url"), (URL, None)):
        answer = client.post(f"/v1/batches/{batch_id}/retry", json={"metadata": {"webhook_url": url}})
        assert answer.status_code == 400  # that with the good URL because nothing is to be retried
        assert answer.json()["error"]["param"] == param
