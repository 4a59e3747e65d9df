"""Webhooks as one kind of target of deliveries: joins stages/webhooks.py to stages/deliveries.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_batch_dagster.core.deliveries import WEBHOOK, DeliveryRecord
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import OutboxEvent
from vllm_batch_dagster.core.webhooks import Outcome
from vllm_batch_dagster.stages.webhooks import WebhookPorts, deliver_event, webhook_targets

# The sender ends an attempt after 10 s; this is for one that does not.
LIMIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class WebhookCourier:
    """See Courier."""

    ports: WebhookPorts
    kind: str = WEBHOOK
    limit_seconds: float = LIMIT_SECONDS

    def targets(self, batch: Batch, event: OutboxEvent) -> Sequence[str]:
        return [target.key for target in webhook_targets(self.ports.store, batch)]

    def attempt(self, delivery: DeliveryRecord, batch: Batch, event: OutboxEvent) -> Outcome:
        return deliver_event(delivery.target, event, self.ports)
