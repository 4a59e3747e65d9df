"""The batch store on SQLite or PostgreSQL: files, batches, chunks, attempts and the outbox, under one schema.

In: calls of the API, the stages and the sensors through the ports. Out: values of the core, durable before a call
returns. `open_store` is all that a caller needs.
"""

from vllm_batch_dagster.adapters.store.opening import open_store
from vllm_batch_dagster.adapters.store.sql_store import SqlStore

__all__ = ["SqlStore", "open_store"]
