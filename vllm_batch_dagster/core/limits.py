"""What a project may use: requests per minute, bytes, queued lines. Pure rules; 0 always means no limit.

The API asks for every request and every upload, validation for every batch.
"""

import math
from dataclasses import dataclass

from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.models import LineError

RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
STORAGE_LIMIT_EXCEEDED = "storage_limit_exceeded"
QUEUE_LIMIT_EXCEEDED = "request_limit_exceeded"
MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket that holds a minute's requests. `tokens` are what is left at `filled_at` (unix seconds)."""

    tokens: float
    filled_at: float


def take_token(bucket: Bucket | None, per_minute: int, now: float) -> tuple[Bucket, float]:
    """Return the bucket after one request, and the seconds to wait: 0.0 when the request may go on.

    `None` is the full bucket of a project that has asked nothing yet. A clock that was set back fills nothing.
    """
    old = bucket or Bucket(float(per_minute), now)
    passed = max(0.0, now - old.filled_at)
    tokens = min(float(per_minute), old.tokens + passed * per_minute / MINUTE)
    if tokens >= 1.0:
        return Bucket(tokens - 1.0, now), 0.0
    return Bucket(tokens, now), (1.0 - tokens) * MINUTE / per_minute


def retry_after(wait: float) -> int:
    """Return whole seconds for the header Retry-After, from 1 to 60: clients wait no longer than that by themselves."""
    return max(1, min(int(MINUTE), math.ceil(wait)))


def rate_message(project: str, per_minute: int, wait: float) -> str:
    return (
        f"Rate limit reached for project '{project}' on requests per min (RPM): Limit {per_minute}. "
        f"Please try again in {retry_after(wait)}s."
    )


@dataclass(frozen=True, slots=True)
class StorageRoom:
    """How much a project may store: `most` bytes, of which `stored` are taken."""

    project_id: str
    stored: int
    most: int

    def check(self, size: int) -> None:
        """Raises InvalidInput when `size` more bytes do not fit."""
        if self.stored + size > self.most:
            raise InvalidInput(
                f"Project '{self.project_id}' may store {self.most} bytes and stores {self.stored}: this file does "
                "not fit. Delete files that are no longer needed, or raise MAX_STORED_BYTES.",
                param="file",
                code=STORAGE_LIMIT_EXCEEDED,
            )


def check_queue(project: str, queued: int, lines: int, most: int) -> LineError | None:
    """Return why a batch of `lines` may not join the `queued` unanswered lines of its project, or None."""
    if not most or queued + lines <= most:
        return None
    return LineError(
        QUEUE_LIMIT_EXCEEDED,
        f"Enqueued request limit reached for project '{project}'. Limit: {most} enqueued requests, of which "
        f"{queued} are taken; this batch has {lines}. Please try again once some in_progress batches have been "
        "completed.",
    )
