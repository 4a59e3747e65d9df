"""The batch store on a SQL database: the meeting point of the shim and Dagster. Made by `open_store`."""

from collections.abc import Sequence
from dataclasses import fields

from sqlalchemy import select

from vllm_batch_dagster.adapters.store.batch_records import SqlBatchRecords
from vllm_batch_dagster.adapters.store.chunk_records import SqlChunkRecords
from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.delivery_records import SqlDeliveryRecords
from vllm_batch_dagster.adapters.store.file_records import SqlFileRecords
from vllm_batch_dagster.adapters.store.idempotency_records import SqlIdempotencyRecords
from vllm_batch_dagster.adapters.store.key_records import SqlKeyRecords
from vllm_batch_dagster.adapters.store.pause_records import SqlPauseRecords
from vllm_batch_dagster.adapters.store.retention_records import SqlRetentionRecords
from vllm_batch_dagster.adapters.store.schema import events
from vllm_batch_dagster.adapters.store.upload_records import SqlUploadRecords
from vllm_batch_dagster.adapters.store.webhook_records import SqlWebhookRecords
from vllm_batch_dagster.core.ports import OutboxEvent


class SqlStore:
    """See BatchStore. Safe to use from many threads and processes at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._files = SqlFileRecords(database)
        self._batches = SqlBatchRecords(database)
        self._chunks = SqlChunkRecords(database)
        self._uploads = SqlUploadRecords(database)
        self._keys = SqlKeyRecords(database)
        self._idempotency = SqlIdempotencyRecords(database)
        self._deliveries = SqlDeliveryRecords(database)
        self._retention = SqlRetentionRecords(database)
        self._pauses = SqlPauseRecords(database)
        self._webhooks = SqlWebhookRecords(database)

    @property
    def files(self) -> SqlFileRecords:
        return self._files

    @property
    def batches(self) -> SqlBatchRecords:
        return self._batches

    @property
    def chunks(self) -> SqlChunkRecords:
        return self._chunks

    @property
    def deliveries(self) -> SqlDeliveryRecords:
        return self._deliveries

    @property
    def retention(self) -> SqlRetentionRecords:
        return self._retention

    @property
    def keys(self) -> SqlKeyRecords:
        return self._keys

    @property
    def idempotency(self) -> SqlIdempotencyRecords:
        return self._idempotency

    @property
    def pauses(self) -> SqlPauseRecords:
        return self._pauses

    @property
    def uploads(self) -> SqlUploadRecords:
        return self._uploads

    @property
    def webhooks(self) -> SqlWebhookRecords:
        return self._webhooks

    def events(self, batch_id: str) -> Sequence[OutboxEvent]:
        """Outbox events of a batch, oldest first; empty for an unknown one."""
        columns = [events.c[field.name] for field in fields(OutboxEvent)]
        query = select(*columns).where(events.c.batch_id == batch_id).order_by(events.c.seq)
        with self._database.reading() as connection:
            return [OutboxEvent(*row) for row in connection.execute(query)]

    def close(self) -> None:
        """Close every connection. The store can not be used while another thread still works with it."""
        self._database.close()
