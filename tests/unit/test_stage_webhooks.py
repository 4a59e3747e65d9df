"""From the event of a batch to its webhooks: targets, the attempt at one of them, and the clock of each attempt."""

import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai.types.webhooks import BatchFailedWebhookEvent

from tests.conformance.receiver import Delivery, Receiver
from vllm_batch_dagster.adapters.memory import FixedClock, MemoryStore
from vllm_batch_dagster.adapters.webhooks import HttpWebhookSender
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import OutboxEvent
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.core.webhook_urls import read_allowed_hosts
from vllm_batch_dagster.core.webhooks import (
    EVENT_TYPES,
    EndpointParams,
    SigningSecret,
    WebhookEndpoint,
    make_endpoint,
    new_signing_secret,
)
from vllm_batch_dagster.stages.webhooks import WebhookPorts, deliver_event, send_sample, webhook_targets

NOW = 1_700_000_000
TEN_MINUTES = 600


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock(NOW)


@pytest.fixture
def ports(store: MemoryStore, clock: FixedClock) -> WebhookPorts:
    return WebhookPorts(store, HttpWebhookSender(read_allowed_hosts("127.0.0.1")), clock, secrets.token_bytes)


def add_endpoint(store: MemoryStore, url: str, project_id: str = "team-a", *types: str) -> WebhookEndpoint:
    params = EndpointParams("mine", url, types or EVENT_TYPES)
    endpoint = make_endpoint(params, project_id, secrets.token_bytes, NOW)
    store.webhooks.add(endpoint)
    return endpoint


def fail_batch(store: MemoryStore, **metadata: str) -> tuple[Batch, OutboxEvent]:
    batch = Batch("batch_1", "file-1", "/v1/embeddings", "24h", BatchStatus.VALIDATING, NOW, NOW + 86_400)
    store.batches.add(replace(batch, project_id="team-a", metadata=metadata or None))
    failed = store.batches.advance("batch_1", BatchEvent.INVALID, NOW)
    return failed, store.events("batch_1")[0]


def unwrap(delivery: Delivery, secret: str, monkeypatch: pytest.MonkeyPatch, now: int, body: bytes = b"") -> Any:
    """Take a delivery as the official client does at `now`."""
    with monkeypatch.context() as patched:
        patched.setattr("openai.lib._webhooks.time.time", lambda: now)
        client = openai.OpenAI(api_key="none")
        return client.webhooks.unwrap(body or delivery.body, delivery.headers, secret=secret)


def test_targets_are_the_projects_listeners_and_the_batchs_own_url(store: MemoryStore) -> None:
    one = add_endpoint(store, "https://example.com/1")
    add_endpoint(store, "https://example.com/2", "team-a", "batch.completed")
    add_endpoint(store, "https://example.com/3", "team-b")
    batch, _ = fail_batch(store, webhook_url="https://example.com/own")

    targets = [(target.key, target.url) for target in webhook_targets(store, batch)]
    assert targets == [
        (f"webhook:{one.id}", "https://example.com/1"),
        ("webhook:metadata", "https://example.com/own"),
    ]


def test_a_batch_that_nobody_listens_to_has_no_target(store: MemoryStore) -> None:
    assert webhook_targets(store, fail_batch(store)[0]) == []


def test_a_retry_ten_minutes_later_is_signed_anew(
    store: MemoryStore, ports: WebhookPorts, clock: FixedClock, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = add_endpoint(store, f"{receiver.url}/error")
    _, event = fail_batch(store)
    assert deliver_event(f"webhook:{endpoint.id}", event, ports).status == 500
    clock.advance(TEN_MINUTES)
    assert deliver_event(f"webhook:{endpoint.id}", event, ports).is_delivered

    first, second = receiver.got("error")
    assert first.id == second.id
    assert first.body == second.body
    secret = endpoint.secret.current
    later = NOW + TEN_MINUTES
    taken = unwrap(second, secret, monkeypatch, later)
    assert isinstance(taken, BatchFailedWebhookEvent)
    assert (taken.id, taken.created_at, taken.data.id) == (event.id, event.created_at, "batch_1")
    with pytest.raises(openai.InvalidWebhookSignatureError, match="too old"):
        unwrap(first, secret, monkeypatch, later)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(second, secret, monkeypatch, later, body=second.body.replace(b"batch_1", b"batch_2"))


def test_both_secrets_sign_during_a_rotation_and_one_after_it(
    store: MemoryStore, ports: WebhookPorts, clock: FixedClock, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = add_endpoint(store, f"{receiver.url}/ok")
    _, event = fail_batch(store)
    new = new_signing_secret(secrets.token_bytes)
    store.webhooks.rotate(endpoint.id, new, NOW, keep_old=True)
    deliver_event(f"webhook:{endpoint.id}", event, ports)
    clock.advance(86_400)
    deliver_event(f"webhook:{endpoint.id}", event, ports)

    during, after = receiver.got("ok")
    old = endpoint.secret.current
    for secret in (new, old):
        unwrap(during, secret, monkeypatch, NOW)
    unwrap(after, new, monkeypatch, NOW + 86_400)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(after, old, monkeypatch, NOW + 86_400)


def test_the_url_of_the_metadata_is_signed_with_the_projects_secret(
    store: MemoryStore, ports: WebhookPorts, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, event = fail_batch(store, webhook_url=f"{receiver.url}/ok")
    assert deliver_event("webhook:metadata", event, ports).is_delivered
    (delivery,) = receiver.got("ok")
    secret = store.webhooks.project_secret("team-a", "whsec_none")
    assert isinstance(secret, SigningSecret)
    unwrap(delivery, secret.current, monkeypatch, NOW)


def test_an_attempt_goes_where_the_endpoint_points_now(
    store: MemoryStore, ports: WebhookPorts, receiver: Receiver
) -> None:
    endpoint = add_endpoint(store, f"{receiver.url}/error")
    _, event = fail_batch(store)
    store.webhooks.change(endpoint.id, EndpointParams(url=f"{receiver.url}/ok"), NOW)
    assert deliver_event(f"webhook:{endpoint.id}", event, ports).is_delivered
    assert receiver.got("error") == []


def test_a_target_that_is_gone_is_final(store: MemoryStore, ports: WebhookPorts) -> None:
    endpoint = add_endpoint(store, "https://example.com/")
    _, event = fail_batch(store)
    store.webhooks.delete(endpoint.id)
    for key in (f"webhook:{endpoint.id}", "webhook:metadata"):
        outcome = deliver_event(key, event, ports)
        assert (outcome.is_delivered, outcome.is_final) == (False, True)
    gone = deliver_event("webhook:metadata", replace(event, batch_id="batch_gone"), ports)
    assert gone.is_final


def test_a_sample_is_signed_as_an_event_is(
    store: MemoryStore, ports: WebhookPorts, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = add_endpoint(store, f"{receiver.url}/empty")
    for _ in range(2):
        assert send_sample(endpoint, "batch.failed", ports).status in (204, 200)
    one, other = receiver.got("empty")
    assert one.id != other.id
    assert isinstance(unwrap(one, endpoint.secret.current, monkeypatch, NOW), BatchFailedWebhookEvent)
