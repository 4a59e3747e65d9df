"""The batch state machine: one table, applied by every store with compare-and-set.

            create
              |
              v        invalid
         validating ------------> failed
          |      |
   planned|      |cancel
          v      v        stopped
    in_progress -+--> cancelling ---------> cancelled
      |   |      ^         ^
      |   |      +-cancel--+ (also from finalizing)
      |   +--deadline--> expired   (also from finalizing)
      v merge
   finalizing --published--> completed

Meanings are OpenAI's (Batch guide; contract section C.3). `failed` means only that the input did not pass
validation; a request that fails never makes a batch `failed`. Terminal: failed, completed, expired, cancelled.
"""

from enum import StrEnum

from vllm_batch_dagster.core.errors import StateConflict


class BatchStatus(StrEnum):
    """OpenAI's eight statuses."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class BatchEvent(StrEnum):
    """What can happen to a batch."""

    INVALID = "invalid"
    PLANNED = "planned"
    MERGE = "merge"
    PUBLISHED = "published"
    CANCEL = "cancel"
    STOPPED = "stopped"
    DEADLINE = "deadline"


_S, _E = BatchStatus, BatchEvent

TRANSITIONS: dict[tuple[BatchStatus, BatchEvent], BatchStatus] = {
    (_S.VALIDATING, _E.INVALID): _S.FAILED,
    (_S.VALIDATING, _E.PLANNED): _S.IN_PROGRESS,
    (_S.VALIDATING, _E.CANCEL): _S.CANCELLING,
    (_S.VALIDATING, _E.DEADLINE): _S.EXPIRED,
    (_S.IN_PROGRESS, _E.MERGE): _S.FINALIZING,
    (_S.IN_PROGRESS, _E.CANCEL): _S.CANCELLING,
    (_S.IN_PROGRESS, _E.DEADLINE): _S.EXPIRED,
    (_S.FINALIZING, _E.PUBLISHED): _S.COMPLETED,
    (_S.FINALIZING, _E.CANCEL): _S.CANCELLING,
    (_S.FINALIZING, _E.DEADLINE): _S.EXPIRED,
    (_S.CANCELLING, _E.STOPPED): _S.CANCELLED,
}

TERMINAL = frozenset({_S.FAILED, _S.COMPLETED, _S.EXPIRED, _S.CANCELLED})

# The Batch object's field that records when a status was entered (contract C.2).
TIMESTAMP_FIELD: dict[BatchStatus, str] = {
    _S.IN_PROGRESS: "in_progress_at",
    _S.FINALIZING: "finalizing_at",
    _S.COMPLETED: "completed_at",
    _S.FAILED: "failed_at",
    _S.EXPIRED: "expired_at",
    _S.CANCELLING: "cancelling_at",
    _S.CANCELLED: "cancelled_at",
}


def advance(status: BatchStatus, event: BatchEvent) -> BatchStatus:
    """Return the status after `event`. Raises StateConflict when the table has no such move."""
    try:
        return TRANSITIONS[status, event]
    except KeyError:
        raise StateConflict(f"a batch that is {status.value} cannot take the event {event.value}") from None


def sources_of(event: BatchEvent) -> frozenset[BatchStatus]:
    """Return the statuses from which `event` is legal: the compare side of a store's compare-and-set."""
    return frozenset(status for status, known in TRANSITIONS if known is event)
