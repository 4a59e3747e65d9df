"""What deliveries need from the batch store. Beside `ports.py`, which takes it in."""

from collections.abc import Collection, Sequence
from typing import Protocol

from vllm_batch_dagster.core.deliveries import DeliveryRecord, DeliveryState


class DeliveryRecords(Protocol):
    """Deliveries of the outbox events. Core/deliveries.py says what a change means; here it is only kept."""

    def plan(self, event_id: str, version: int, deliveries: Sequence[DeliveryRecord]) -> None:
        """Store those of `deliveries` that are not there yet, and that the event is planned for `version`, in one
        transaction. Raises NotFound("event", id)."""

    def get(self, delivery_id: str) -> DeliveryRecord:
        """Raises NotFound("delivery", id)."""

    def of_batch(self, batch_id: str) -> Sequence[DeliveryRecord]:
        """Oldest first."""

    def list(
        self, *, limit: int, states: Collection[DeliveryState] = (), project_id: str | None = None
    ) -> Sequence[DeliveryRecord]:
        """The newest ones first, in any of `states` (none given: in all of them)."""

    def due(self, now: float, limit: int) -> Sequence[str]:
        """The batches for which something is to be done, who waits longest first: an event is not planned, or a
        pending delivery is due."""

    def change(self, seen: DeliveryRecord, new: DeliveryRecord) -> bool:
        """Compare and set: store `new` if nobody has changed the delivery since it was `seen`. Durable when it returns
        True."""
