"""Delivers the events of batches to webhooks: finds the targets of a batch, and makes one attempt at one of them.

The last step of the data path, behind the outbox event that ends a batch. Which attempts are due, and the state of
each, is kept by the deliveries; here is what one attempt does.
"""

from dataclasses import dataclass

from vllm_batch_dagster.core.creation import ID_BYTES, Randomness, new_batch_id
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import BatchStore, Clock, OutboxEvent
from vllm_batch_dagster.core.webhook_ports import WebhookSender
from vllm_batch_dagster.core.webhooks import (
    METADATA_KEY,
    METADATA_TARGET,
    TARGET_PREFIX,
    Outcome,
    SigningSecret,
    WebhookEndpoint,
    WebhookTarget,
    batch_target,
    endpoint_target,
    event_body,
    new_signing_secret,
)


@dataclass(frozen=True, slots=True)
class WebhookPorts:
    """What an attempt needs from the outside world."""

    store: BatchStore
    sender: WebhookSender
    clock: Clock
    randomness: Randomness


def webhook_targets(store: BatchStore, batch: Batch) -> list[WebhookTarget]:
    """Return the targets of the event of a batch that has ended: the endpoints of its project that listen to this
    type of event, and the `webhook_url` of its own metadata."""
    own = batch_target(batch.metadata)
    listening = store.webhooks.listening(batch.project_id, f"batch.{batch.status.value}")
    return [*map(endpoint_target, listening), *([own] if own else [])]


def deliver_event(target_key: str, event: OutboxEvent, ports: WebhookPorts) -> Outcome:
    """Make one attempt to deliver `event` to one target, by the URL and the secrets that it has now.

    Takes at most about 10 s. A target or batch that is gone is a final outcome; the receiver's faults are outcomes
    too. Raises StorageFailure.
    """
    try:
        url, secret = _address(target_key, event, ports)
    except NotFound as gone:
        return Outcome(is_delivered=False, reason=f"{gone}: it was deleted", is_final=True)
    now = int(ports.clock())
    body = event_body(event.id, event.type, event.created_at, event.batch_id)
    return ports.sender.send(url, event.id, body, secret.active(now), now)


def send_sample(endpoint: WebhookEndpoint, kind: str, ports: WebhookPorts) -> Outcome:
    """Make one attempt with an event of this type about a batch that does not exist. Nothing of it is stored."""
    now = int(ports.clock())
    event_id, batch_id = f"evt_{ports.randomness(ID_BYTES).hex()}", new_batch_id(ports.randomness)
    body = event_body(event_id, kind, now, batch_id)
    return ports.sender.send(endpoint.url, event_id, body, endpoint.secret.active(now), now)


def _address(target_key: str, event: OutboxEvent, ports: WebhookPorts) -> tuple[str, SigningSecret]:
    """Return where the target is and what it is signed with. Raises NotFound."""
    records = ports.store.webhooks
    if target_key != METADATA_TARGET:
        endpoint = records.get(target_key.removeprefix(TARGET_PREFIX))
        return endpoint.url, endpoint.secret
    batch = ports.store.batches.get(event.batch_id)
    own = batch_target(batch.metadata)
    if own is None:
        raise NotFound(METADATA_KEY, event.batch_id)
    return own.url, records.project_secret(batch.project_id, new_signing_secret(ports.randomness))
