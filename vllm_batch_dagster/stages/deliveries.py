"""Takes the event of an ended batch to its targets: plans a delivery for each, makes the attempts, keeps what came of
them. Behind the outbox event on the data path; run by the `deliveries` asset.

Exactly one record per (event, target, version), at least one effect: an attempt is claimed durably before it is made
and settled after it, so a process that dies between the two makes the target see the same delivery, under the same id,
again. Each attempt has a thread and a limit of time of its own: a target that hangs or fails keeps no other waiting.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from vllm_batch_dagster.core.deliveries import (
    DeliveryRecord,
    DeliveryState,
    Wanted,
    claim,
    is_exhausted,
    is_superseded,
    is_wanted,
    plan,
    reopen,
    settle,
)
from vllm_batch_dagster.core.errors import StateConflict
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import BatchStore, Clock, OutboxEvent
from vllm_batch_dagster.core.webhooks import Outcome
from vllm_batch_dagster.failpoints import failpoint
from vllm_batch_dagster.stages.webhooks import webhook_targets

MOST_AT_ONCE = 16
_CLAIM_MARGIN_SECONDS = 60

Report = Callable[[str], None]


class Courier(Protocol):
    """Knows the targets of one kind (`handler`, `webhook`) and makes one attempt at one of them."""

    @property
    def kind(self) -> str: ...

    @property
    def limit_seconds(self) -> float:
        """How long an attempt may take. After that it counts as failed, and its thread is left to itself."""

    def targets(self, batch: Batch, event: OutboxEvent) -> Sequence[str]:
        """The targets of an event, as `<kind>:<name>`."""

    def attempt(self, delivery: DeliveryRecord, batch: Batch, event: OutboxEvent) -> Outcome:
        """What it raises is a failed attempt."""


@dataclass(frozen=True, slots=True)
class DeliveryPorts:
    """What deliveries need from the outside world."""

    store: BatchStore
    couriers: Sequence[Courier]
    clock: Clock


def deliver_batch(
    batch_id: str,
    ports: DeliveryPorts,
    wanted: Wanted,
    *,
    run_id: str,
    forerunners: Collection[str] = (),
    names: Collection[str] = (),
    report: Report = lambda _: None,
) -> Sequence[DeliveryRecord]:
    """Plan what the event of the batch asks for, attempt what is `wanted`, return all deliveries of the batch.

    `names` (targets, or what stands behind their kind; none: all) narrows what is attempted. `forerunners` are dead
    runs that this one retries: what they had claimed is free. Failures of targets are outcomes in the records.
    Raises StateConflict when the batch has not ended, NotFound, StorageFailure.
    """
    failpoint("handlers", batch_id)
    batch, event = _read_event(batch_id, ports.store)
    if not event.is_planned:
        _plan(batch, event, ports)
    pending = ports.store.deliveries.of_batch(batch_id)
    chosen = [each for each in pending if not names or each.target in names or each.name in names]
    trip = _Trip(batch, event, ports, run_id, report)
    for start in range(0, len(chosen), MOST_AT_ONCE):
        taken = (trip.take(each, wanted, forerunners) for each in chosen[start : start + MOST_AT_ONCE])
        trip.attempt([each for each in taken if each is not None])
    return ports.store.deliveries.of_batch(batch_id)


def close_untold(batch: Batch, store: BatchStore) -> bool:
    """Note that the event of a batch is planned when nobody is to be told: it has no results that a handler could
    take, and no webhook listens. Return whether that was so; no run is needed then. Raises StorageFailure."""
    if batch.output_file_id or batch.error_file_id or webhook_targets(store, batch):
        return False
    unplanned = [event for event in store.events(batch.id) if not event.is_planned]
    for event in unplanned:
        store.deliveries.plan(event.id, event.version, ())
    return bool(unplanned)


def replay(delivery: DeliveryRecord, store: BatchStore, clock: Clock) -> DeliveryRecord:
    """Let a delivery be attempted again, as the sensor's next tick finds it. One that is pending comes sooner.

    Raises StateConflict while an attempt is under way, and for a batch whose data has gone.
    """
    now = int(clock())
    if store.batches.get(delivery.batch_id).purged_at is not None:
        raise StateConflict(f"the data of {delivery.batch_id} has gone: it can no longer be delivered")
    if delivery.claimed_by is not None and now < delivery.next_attempt_at:
        raise StateConflict(f"an attempt at {delivery.id} is under way: wait for its end")
    again = reopen(delivery, now)
    if not store.deliveries.change(delivery, again):
        raise StateConflict(f"{delivery.id} has just been changed by somebody else: look at it again")
    return again


def _read_event(batch_id: str, store: BatchStore) -> tuple[Batch, OutboxEvent]:
    """Return a batch and its event as of one moment: a merge after a rerun changes both."""
    while True:
        batch, events = store.batches.get(batch_id), store.events(batch_id)
        if not events:
            raise StateConflict(f"{batch_id} has not ended: there is nothing to deliver yet")
        if events[-1].version == batch.merged_version:
            return batch, events[-1]


def _plan(batch: Batch, event: OutboxEvent, ports: DeliveryPorts) -> None:
    targets = [target for courier in ports.couriers for target in courier.targets(batch, event)]
    planned = plan(event.id, batch, targets, int(ports.clock()), first=event.planned_version is None)
    ports.store.deliveries.plan(event.id, event.version, planned)


class _Trip:
    """One run's attempts at the deliveries of one batch."""

    def __init__(self, batch: Batch, event: OutboxEvent, ports: DeliveryPorts, run_id: str, report: Report) -> None:
        self._batch, self._event, self._ports = batch, event, ports
        self._run_id, self._report = run_id, report
        self._couriers = {courier.kind: courier for courier in ports.couriers}
        self._ended: SimpleQueue[tuple[DeliveryRecord, Outcome]] = SimpleQueue()

    def take(self, seen: DeliveryRecord, wanted: Wanted, forerunners: Collection[str]) -> DeliveryRecord | None:
        """Claim a delivery. None when it is not wanted, somebody else was faster, or it is over without an attempt."""
        now = int(self._ports.clock())
        if is_superseded(seen, self._event.version):
            if seen.state is DeliveryState.PENDING:
                self._give_up(seen, "newer results of the batch took the place of these")
            return None
        if not is_wanted(seen, wanted, now, forerunners) or seen.kind not in self._couriers:
            return None
        if seen.state is not DeliveryState.PENDING or wanted is not Wanted.DUE:
            fresh = reopen(seen, now)
        elif is_exhausted(seen, now):
            self._give_up(seen, "72 hours of attempts, and none of the last ones came to an end")
            return None
        else:
            fresh = seen
        limit = self._couriers[seen.kind].limit_seconds
        claimed = claim(fresh, self._run_id, now + int(limit) + _CLAIM_MARGIN_SECONDS)
        return claimed if self._ports.store.deliveries.change(seen, claimed) else None

    def attempt(self, claimed: Sequence[DeliveryRecord]) -> None:
        """Make one attempt at each, all at once, and keep what comes of each as soon as it has ended."""
        begun = time.monotonic()
        ends = {each.id: begun + self._couriers[each.kind].limit_seconds for each in claimed}
        under_way = {each.id: each for each in claimed}
        try:
            for each in claimed:
                threading.Thread(target=self._run, args=(each,), name=each.target, daemon=True).start()
            while under_way:
                for delivery, outcome in list(self._next(under_way, ends)):
                    settled = self._settle(delivery, outcome)
                    del under_way[delivery.id]
                    self._report(describe(settled))
        finally:
            for delivery in under_way.values():  # the run is being stopped
                self._settle(delivery, Outcome(False, reason="the run was stopped during the attempt"))

    def _run(self, delivery: DeliveryRecord) -> None:
        """Make one attempt. On a thread of its own, which nobody waits for when its time is over."""
        try:
            outcome = self._couriers[delivery.kind].attempt(delivery, self._batch, self._event)
        except BaseException as error:  # noqa: BLE001 - other people's code, SystemExit included
            outcome = Outcome(False, reason=f"{type(error).__name__}: {error}")
        self._ended.put((delivery, outcome))

    def _next(
        self, under_way: dict[str, DeliveryRecord], ends: dict[str, float]
    ) -> Iterator[tuple[DeliveryRecord, Outcome]]:
        """Wait for the next attempt that ends, or yield those whose time is over."""
        first_end = min(ends[delivery_id] for delivery_id in under_way)
        try:
            delivery, outcome = self._ended.get(timeout=max(0.0, first_end - time.monotonic()))
        except Empty:
            for delivery in [each for each in under_way.values() if ends[each.id] <= first_end]:
                limit = self._couriers[delivery.kind].limit_seconds
                yield delivery, Outcome(False, reason=f"no end after {limit:g} s: the attempt was left to itself")
            return
        if delivery.id in under_way:  # else it ended after its time, and counts as failed
            yield delivery, outcome

    def _settle(self, claimed: DeliveryRecord, outcome: Outcome) -> DeliveryRecord:
        settled = settle(claimed, outcome, int(self._ports.clock()))
        self._ports.store.deliveries.change(claimed, settled)
        return settled

    def _give_up(self, seen: DeliveryRecord, reason: str) -> None:
        dead = settle(seen, Outcome(False, reason=reason, is_final=True), int(self._ports.clock()))
        if self._ports.store.deliveries.change(seen, dead):
            self._report(describe(dead))


def describe(delivery: DeliveryRecord) -> str:
    """Return a sentence for logs."""
    said = f"{delivery.target}: {delivery.state.value} after {delivery.attempts} attempts"
    return said if delivery.last_error is None else f"{said}: {delivery.last_error}"
