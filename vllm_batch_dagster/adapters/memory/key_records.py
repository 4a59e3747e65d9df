"""The bearer keys in memory."""

from collections.abc import Sequence
from dataclasses import replace

from vllm_batch_dagster.adapters.memory.tables import Tables
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.keys import Key


class MemoryKeyRecords:
    """See KeyRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def add(self, key: Key) -> None:
        """Raises StateConflict when the id or the hash is taken."""
        with self._tables.lock:
            known = self._tables.keys
            if key.id in known or any(key.hash == other.hash for other in known.values()):
                raise StateConflict(f"this key exists already: {key.id}")
            known[key.id] = key

    def list(self) -> Sequence[Key]:
        with self._tables.lock:
            return list(self._tables.keys.values())

    def revoke(self, key_id: str, now: int) -> Key:
        with self._tables.lock:
            key = self._tables.keys.get(key_id)
            if key is None:
                raise NotFound("key", key_id)
            if key.is_live:
                key = self._tables.keys[key_id] = replace(key, revoked_at=now)
            return key

    def touch(self, key_id: str, now: int) -> None:
        with self._tables.lock:
            if key := self._tables.keys.get(key_id):
                self._tables.keys[key_id] = replace(key, last_used_at=now)
