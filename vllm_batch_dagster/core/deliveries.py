"""Decides about deliveries: an ended batch's event on its way to one target, a result handler or a webhook.

A delivery is made once for (event, target, version of the results) and tried until it is delivered or dead:

    pending --delivered--> delivered          claimed: pending, and nobody else tries until `next_attempt_at`
       |  ^                    |
       |  +------ replay ------+--- dead      a person asked again
       +--72 hours, or useless----> dead

Pure; stages/deliveries.py acts on it, the `deliveries` asset runs that.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from math import ceil

from vllm_batch_dagster.core.models import DEFAULT_PROJECT, Batch
from vllm_batch_dagster.core.webhooks import GIVE_UP_SECONDS, Outcome, next_attempt

HANDLER, WEBHOOK = "handler", "webhook"
MOST_ERROR_CHARACTERS = 1000


class DeliveryState(StrEnum):
    """Where a delivery stands. A dead one is left alone until somebody replays it."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """One event for one target. `id` is the idempotency key: the same for each attempt, another for other results.

    `target` is `handler:<name>` or `webhook:<endpoint>`; `version` the batch's `merged_version` whose results are
    meant. `since` is when the present round of attempts began, at creation or at a replay, and `attempts` how many of
    it have begun. The next one is due at `next_attempt_at`; `claimed_by` is the run that is at one until then. Times
    in unix seconds.
    """

    id: str
    batch_id: str
    event_id: str
    target: str
    created_at: int
    since: int
    next_attempt_at: int
    version: int = 0
    project_id: str = DEFAULT_PROJECT
    state: DeliveryState = DeliveryState.PENDING
    attempts: int = 0
    claimed_by: str | None = None
    last_error: str | None = None
    delivered_at: int | None = None

    @property
    def kind(self) -> str:
        """`handler` or `webhook`."""
        return self.target.partition(":")[0]

    @property
    def name(self) -> str:
        """What stands behind the kind."""
        return self.target.partition(":")[2]


class Wanted(StrEnum):
    """Which deliveries of a batch a run takes on."""

    DUE = "due"
    """Those whose time has come: what the sensor asks for."""
    UNDELIVERED = "undelivered"
    """Those that are not delivered, dead ones too: a person ran the partition again."""
    ALL = "all"
    """Those that are delivered as well: a person asked for them again."""


def new_delivery(
    batch_id: str, event_id: str, target: str, now: int, *, version: int, project_id: str = DEFAULT_PROJECT
) -> DeliveryRecord:
    """Return a delivery that is due at once. The id follows from event, target and version alone, so what is planned
    twice is there once."""
    digest = sha256(f"{event_id} {target} {version}".encode()).hexdigest()
    return DeliveryRecord(f"dlv_{digest[:32]}", batch_id, event_id, target, now, now, now, version, project_id)


def plan(event_id: str, batch: Batch, targets: Sequence[str], now: int, *, first: bool) -> list[DeliveryRecord]:
    """Return the deliveries of the event of a batch to `targets`. Only the `first` time, not after a new merge, are
    webhooks told: the batch ended once. Handlers get each version of the results."""
    return [
        new_delivery(
            batch.id,
            event_id,
            target,
            now,
            version=batch.merged_version if is_handler else 0,
            project_id=batch.project_id,
        )
        for target in targets
        if (is_handler := target.startswith(f"{HANDLER}:")) or first
    ]


def is_superseded(delivery: DeliveryRecord, version: int) -> bool:
    """True when the results that a handler was to get have been replaced by those of `version`."""
    return delivery.kind == HANDLER and delivery.version != version


def is_wanted(delivery: DeliveryRecord, wanted: Wanted, now: float, forerunners: Collection[str] = ()) -> bool:
    """True when a run takes `delivery` on. What another run is at is left alone until its time is over, unless that
    run is one of the dead `forerunners` that this one retries."""
    if delivery.state is DeliveryState.DELIVERED:
        return wanted is Wanted.ALL
    if delivery.state is DeliveryState.DEAD:
        return wanted is not Wanted.DUE
    if now >= delivery.next_attempt_at or delivery.claimed_by in forerunners:
        return True
    return delivery.claimed_by is None and wanted is not Wanted.DUE


def reopen(delivery: DeliveryRecord, now: int) -> DeliveryRecord:
    """Return `delivery` with a new round of attempts, due at once. The last error is shown until an attempt ends."""
    return replace(
        delivery,
        state=DeliveryState.PENDING,
        since=now,
        attempts=0,
        next_attempt_at=now,
        claimed_by=None,
        delivered_at=None,
    )


def claim(delivery: DeliveryRecord, run_id: str, until: int) -> DeliveryRecord:
    """Return `delivery` as one more attempt of `run_id` holds it. If the run dies, it is due again at `until`."""
    return replace(delivery, attempts=delivery.attempts + 1, claimed_by=run_id, next_attempt_at=until)


def settle(claimed: DeliveryRecord, outcome: Outcome, now: int) -> DeliveryRecord:
    """Return a claimed delivery after its attempt ended at `now`."""
    if outcome.is_delivered:
        return replace(
            claimed,
            state=DeliveryState.DELIVERED,
            claimed_by=None,
            next_attempt_at=now,
            last_error=None,
            delivered_at=now,
        )
    error = outcome.reason[:MOST_ERROR_CHARACTERS]
    following = next_attempt(claimed.event_id, claimed.attempts, claimed.since, now)
    if outcome.is_final or following is None:
        return replace(claimed, state=DeliveryState.DEAD, claimed_by=None, next_attempt_at=now, last_error=error)
    return replace(claimed, claimed_by=None, next_attempt_at=ceil(following), last_error=error)


def is_exhausted(delivery: DeliveryRecord, now: float) -> bool:
    """True when the time of a delivery ran out although no attempt ended: each took its process down."""
    return delivery.claimed_by is not None and now > delivery.since + GIVE_UP_SECONDS
