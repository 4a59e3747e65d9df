"""The batch store in memory."""

from collections.abc import Sequence

from vllm_batch_dagster.adapters.memory.batch_records import MemoryBatchRecords
from vllm_batch_dagster.adapters.memory.chunk_records import MemoryChunkRecords
from vllm_batch_dagster.adapters.memory.delivery_records import MemoryDeliveryRecords
from vllm_batch_dagster.adapters.memory.file_records import MemoryFileRecords
from vllm_batch_dagster.adapters.memory.idempotency_records import MemoryIdempotencyRecords
from vllm_batch_dagster.adapters.memory.key_records import MemoryKeyRecords
from vllm_batch_dagster.adapters.memory.pause_records import MemoryPauseRecords
from vllm_batch_dagster.adapters.memory.retention_records import MemoryRetentionRecords
from vllm_batch_dagster.adapters.memory.tables import Tables
from vllm_batch_dagster.adapters.memory.upload_records import MemoryUploadRecords
from vllm_batch_dagster.adapters.memory.webhook_records import MemoryWebhookRecords
from vllm_batch_dagster.core.ports import OutboxEvent


class MemoryStore:
    """See BatchStore. Safe to use from many threads at once; one process only."""

    def __init__(self) -> None:
        self._tables = Tables()
        self._files = MemoryFileRecords(self._tables)
        self._batches = MemoryBatchRecords(self._tables)
        self._chunks = MemoryChunkRecords(self._tables)
        self._uploads = MemoryUploadRecords(self._tables)
        self._keys = MemoryKeyRecords(self._tables)
        self._idempotency = MemoryIdempotencyRecords(self._tables)
        self._deliveries = MemoryDeliveryRecords(self._tables)
        self._retention = MemoryRetentionRecords(self._tables)
        self._pauses = MemoryPauseRecords(self._tables)
        self._webhooks = MemoryWebhookRecords(self._tables)

    @property
    def files(self) -> MemoryFileRecords:
        return self._files

    @property
    def batches(self) -> MemoryBatchRecords:
        return self._batches

    @property
    def chunks(self) -> MemoryChunkRecords:
        return self._chunks

    @property
    def deliveries(self) -> MemoryDeliveryRecords:
        return self._deliveries

    @property
    def retention(self) -> MemoryRetentionRecords:
        return self._retention

    @property
    def keys(self) -> MemoryKeyRecords:
        return self._keys

    @property
    def idempotency(self) -> MemoryIdempotencyRecords:
        return self._idempotency

    @property
    def pauses(self) -> MemoryPauseRecords:
        return self._pauses

    @property
    def uploads(self) -> MemoryUploadRecords:
        return self._uploads

    @property
    def webhooks(self) -> MemoryWebhookRecords:
        return self._webhooks

    def events(self, batch_id: str) -> Sequence[OutboxEvent]:
        """Outbox events of a batch, oldest first; empty for an unknown one."""
        with self._tables.lock:
            return [event for event in self._tables.events if event.batch_id == batch_id]

    def close(self) -> None:
        """Nothing is held."""
