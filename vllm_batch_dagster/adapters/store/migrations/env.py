"""Alembic runs this file for every command. The connection, with its transaction, comes from opening.py."""

from alembic import context

from vllm_batch_dagster.adapters.store.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
