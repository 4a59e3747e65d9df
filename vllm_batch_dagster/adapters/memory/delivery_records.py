"""The deliveries of the outbox events in memory."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import islice

from vllm_batch_dagster.adapters.memory.tables import Tables
from vllm_batch_dagster.core.deliveries import DeliveryRecord, DeliveryState
from vllm_batch_dagster.core.errors import NotFound


class MemoryDeliveryRecords:
    """See DeliveryRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def plan(self, event_id: str, version: int, deliveries: Sequence[DeliveryRecord]) -> None:
        with self._tables.lock:
            found = [at for at, event in enumerate(self._tables.events) if event.id == event_id]
            if not found:
                raise NotFound("event", event_id)
            self._tables.events[found[0]] = replace(self._tables.events[found[0]], planned_version=version)
            for delivery in deliveries:
                self._tables.deliveries.setdefault(delivery.id, delivery)

    def get(self, delivery_id: str) -> DeliveryRecord:
        with self._tables.lock:
            if delivery_id not in self._tables.deliveries:
                raise NotFound("delivery", delivery_id)
            return self._tables.deliveries[delivery_id]

    def of_batch(self, batch_id: str) -> Sequence[DeliveryRecord]:
        with self._tables.lock:
            return [delivery for delivery in self._tables.deliveries.values() if delivery.batch_id == batch_id]

    def list(
        self, *, limit: int, states: Collection[DeliveryState] = (), project_id: str | None = None
    ) -> Sequence[DeliveryRecord]:
        with self._tables.lock:
            newest = reversed(self._tables.deliveries.values())
            wanted = (
                delivery
                for delivery in newest
                if (not states or delivery.state in states) and project_id in (None, delivery.project_id)
            )
            return list(islice(wanted, limit))

    def due(self, now: float, limit: int) -> Sequence[str]:
        with self._tables.lock:
            unplanned = [(event.created_at, event.batch_id) for event in self._tables.events if not event.is_planned]
            waiting = [
                (delivery.next_attempt_at, delivery.batch_id)
                for delivery in self._tables.deliveries.values()
                if delivery.state is DeliveryState.PENDING and delivery.next_attempt_at <= now
            ]
        return list(dict.fromkeys(batch_id for _, batch_id in sorted(unplanned + waiting)))[:limit]

    def change(self, seen: DeliveryRecord, new: DeliveryRecord) -> bool:
        with self._tables.lock:
            known = self._tables.deliveries.get(seen.id)
            if known is None or _compared(known) != _compared(seen):
                return False
            self._tables.deliveries[seen.id] = new
            return True


def _compared(delivery: DeliveryRecord) -> tuple[DeliveryState, int, int]:
    return delivery.state, delivery.attempts, delivery.next_attempt_at
