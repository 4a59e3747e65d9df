"""The batch store in memory."""

from collections.abc import Sequence

from vllm_batch_dagster.adapters.memory.batch_records import MemoryBatchRecords
from vllm_batch_dagster.adapters.memory.chunk_records import MemoryChunkRecords
from vllm_batch_dagster.adapters.memory.file_records import MemoryFileRecords
from vllm_batch_dagster.adapters.memory.tables import Tables
from vllm_batch_dagster.core.ports import OutboxEvent


class MemoryStore:
    """See BatchStore. Safe to use from many threads at once; one process only."""

    def __init__(self) -> None:
        self._tables = Tables()
        self._files = MemoryFileRecords(self._tables)
        self._batches = MemoryBatchRecords(self._tables)
        self._chunks = MemoryChunkRecords(self._tables)

    @property
    def files(self) -> MemoryFileRecords:
        return self._files

    @property
    def batches(self) -> MemoryBatchRecords:
        return self._batches

    @property
    def chunks(self) -> MemoryChunkRecords:
        return self._chunks

    def events(self, batch_id: str) -> Sequence[OutboxEvent]:
        """Outbox events of a batch, oldest first; empty for an unknown one."""
        with self._tables.lock:
            return [event for event in self._tables.events if event.batch_id == batch_id]

    def close(self) -> None:
        """Nothing is held."""
