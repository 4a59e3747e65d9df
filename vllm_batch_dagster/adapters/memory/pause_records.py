"""The pauses in memory."""

from collections.abc import Sequence

from vllm_batch_dagster.adapters.memory.tables import Tables
from vllm_batch_dagster.core.pauses import Pause, PauseCause


class MemoryPauseRecords:
    """See PauseRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def list(self) -> Sequence[Pause]:
        with self._tables.lock:
            return sorted(self._tables.pauses.values(), key=lambda pause: (pause.since, pause.scope, pause.cause.value))

    def put(self, pause: Pause) -> None:
        with self._tables.lock:
            self._tables.pauses[pause.scope, pause.cause] = pause

    def remove(self, scope: str, cause: PauseCause) -> bool:
        with self._tables.lock:
            return self._tables.pauses.pop((scope, cause), None) is not None
