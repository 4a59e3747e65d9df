"""Partition sets of the graph: a dynamic key per batch, and batch x chunk slot for the chunks.

The cross product is the one layout in which lineage, staleness and backfills from the UI all work (dagster report
section 1). Slots that a batch does not need are materialized as empty when it is validated.
"""

import dagster as dg

BATCH_DIMENSION, CHUNK_DIMENSION = "batch", "chunk"

batches = dg.DynamicPartitionsDefinition(name="batches")


def chunk_cells(slots: int) -> dg.MultiPartitionsDefinition:
    """Return the partitions of `chunk_results` for `slots` chunk slots per batch."""
    chunks = dg.StaticPartitionsDefinition([slot_key(index) for index in range(slots)])
    return dg.MultiPartitionsDefinition({BATCH_DIMENSION: batches, CHUNK_DIMENSION: chunks})


def slot_key(index: int) -> str:
    return f"{index:04d}"


def cell_key(batch_id: str, index: int) -> dg.MultiPartitionKey:
    """Return the partition key of one chunk of one batch."""
    return dg.MultiPartitionKey({BATCH_DIMENSION: batch_id, CHUNK_DIMENSION: slot_key(index)})


def split_cell(key: str) -> tuple[str, int]:
    """Return (batch id, chunk index) of a cell's key. Dimensions sort by name, so it reads `batch|chunk`."""
    batch_id, slot = key.split("|")
    return batch_id, int(slot)
