"""What a change does to a batch or a chunk, apart from any database. Used by the SQL store and its in-memory twin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_batch_dagster.core.errors import StaleAttempt, StateConflict
from vllm_batch_dagster.core.models import Attempt, Batch, Chunk, ChunkRange
from vllm_batch_dagster.core.states import TERMINAL, TIMESTAMP_FIELD, BatchEvent, BatchStatus, advance

PUBLISHED = "published"
SUPERSEDED = "superseded"
ENGINE_FAILURE = "engine_failure"

# What only the store itself sets: identity, order, the state machine and its times, the count of publications.
_STORE_FIELDS = {"id", "project_id", "created_at", "status", "result_version", *TIMESTAMP_FIELD.values()}
CHANGEABLE = frozenset(field.name for field in fields(Batch)) - _STORE_FIELDS

_TIMES = ("created_at", *TIMESTAMP_FIELD.values())


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """The history of one attempt at a chunk. Times in unix seconds; `ended_at` and `outcome` None: still open."""

    epoch: int
    base_epoch: int
    run_id: str
    begun_at: int
    ended_at: int | None = None
    outcome: str | None = None


def check_changes(changes: Mapping[str, object]) -> None:
    """Raises TypeError for a name that is no field of Batch, or one that only the store may set."""
    if unknown := sorted(set(changes) - CHANGEABLE):
        allowed = ", ".join(sorted(CHANGEABLE))
        raise TypeError(f"cannot change {', '.join(unknown)} of a batch; what can be changed is {allowed}")


def apply_event(batch: Batch, event: BatchEvent, now: int, changes: Mapping[str, Any]) -> Batch:
    """Return `batch` after `event`. Counts and usage stay those that it showed, unless `changes` brings others.

    The time of the new status never lies before an earlier one. Raises StateConflict.
    """
    try:
        status = advance(batch.status, event)
    except StateConflict as error:
        raise StateConflict(f"{batch.id}: {error}") from None
    entered = max(now, *(at for name in _TIMES if (at := getattr(batch, name)) is not None))
    return replace(batch, **{**changes, "status": status, TIMESTAMP_FIELD[status]: entered})


def event_type(status: BatchStatus) -> str | None:
    """Return the type of the outbox event that entering `status` causes, None for a status that is not the last."""
    return f"batch.{status.value}" if status in TERMINAL else None


def can_replan(batch_id: str, known: Sequence[Chunk], ranges: Sequence[ChunkRange]) -> bool:
    """True when `ranges` must be stored, False when they are already there.

    A plan that differs (another CHUNK_SIZE after a restart) replaces the old one as long as no attempt has begun;
    later it raises StateConflict.
    """
    if [chunk.range for chunk in known] == list(ranges):
        return False
    if any(chunk.epoch for chunk in known):
        raise StateConflict(f"the chunks of {batch_id} cannot be planned anew: attempts at them have begun")
    return True


def stale(attempt: Attempt, newest: int) -> StaleAttempt:
    """Return the error of an attempt that is not the newest one."""
    return StaleAttempt(
        f"attempt {attempt.epoch} at chunk {attempt.index} of {attempt.batch_id} is superseded by attempt {newest}: "
        "it must stop without publishing"
    )
