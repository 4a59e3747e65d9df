"""What each Idempotency-Key made, in memory. Whoever calls a function of this module holds the tables' lock."""

from vllm_batch_dagster.adapters.memory.tables import KeptClaim, Tables
from vllm_batch_dagster.core.claims import CLAIM_SECONDS, Claim, ClaimKey
from vllm_batch_dagster.core.errors import ClaimConflict


class MemoryIdempotencyRecords:
    """See IdempotencyRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def find(self, claim: Claim, now: float) -> str | None:
        with self._tables.lock:
            kept = _find(self._tables, claim.key, now)
        return None if kept is None else _owner(claim, kept)

    def is_known(self, key: ClaimKey, now: float) -> bool:
        with self._tables.lock:
            return _find(self._tables, key, now) is not None


def find_owner(tables: Tables, claim: Claim | None, object_id: str, now: int) -> str:
    """Return the id of the object that has the claim: `object_id` when it is free. Raises ClaimConflict."""
    kept = _find(tables, claim.key, now) if claim is not None else None
    return object_id if claim is None or kept is None else _owner(claim, kept)


def keep_claim(tables: Tables, claim: Claim | None, object_id: str, now: int) -> None:
    if claim is not None:
        tables.claims[claim.key] = KeptClaim(claim, object_id, now)


def release_claims(tables: Tables, object_id: str) -> None:
    """Forget the claim of an object that is deleted."""
    tables.claims = {key: kept for key, kept in tables.claims.items() if kept.object_id != object_id}


def _find(tables: Tables, key: ClaimKey, now: float) -> KeptClaim | None:
    kept = tables.claims.get(key)
    return kept if kept is not None and kept.created_at > now - CLAIM_SECONDS else None


def _owner(claim: Claim, kept: KeptClaim) -> str:
    if kept.claim.fingerprint != claim.fingerprint:
        raise ClaimConflict(claim.key.key)
    return kept.object_id
