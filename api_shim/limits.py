"""The limits of a project where HTTP meets them: requests per minute for the gate, bytes for uploads.

The rules are in core/limits.py. Buckets live in this process: a restart fills them.
"""

from starlette.responses import Response

from api_shim.deps import Services
from api_shim.errors import envelope
from vllm_batch_dagster.core.claims import ClaimKey
from vllm_batch_dagster.core.limits import (
    RATE_LIMIT_EXCEEDED,
    Bucket,
    StorageRoom,
    rate_message,
    retry_after,
    take_token,
)
from vllm_batch_dagster.core.ports import Clock
from vllm_batch_dagster.stages.quotas import find_room

RATE_TYPE = "requests"  # OpenAI's `type` of this error


class RateLimiter:
    """One token bucket per project. `per_minute` 0 = no limit. One event loop."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, Bucket] = {}

    def refuse(self, project_id: str) -> Response | None:
        """Count one request. Returns the 429 when it is one too many."""
        if not self._per_minute:
            return None
        bucket, wait = take_token(self._buckets.get(project_id), self._per_minute, self._clock())
        self._buckets[project_id] = bucket
        if not wait:
            return None
        return envelope(
            429,
            rate_message(project_id, self._per_minute, wait),
            kind=RATE_TYPE,
            code=RATE_LIMIT_EXCEEDED,
            headers={"retry-after": str(retry_after(wait))},
        )


def storage_room(services: Services, project_id: str, claim_key: ClaimKey | None = None) -> StorageRoom | None:
    """Return what the project may still store, None when that is not limited, or for a repetition: it adds nothing."""
    now = services.clock()
    if claim_key is not None and services.store.idempotency.is_known(claim_key, now):
        return None
    return find_room(project_id, services.settings.max_stored_bytes, services.store, now)
