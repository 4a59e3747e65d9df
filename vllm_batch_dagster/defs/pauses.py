"""Pauses as Dagster shows them: in the log of the run, and as an observation of the chunk that waits."""

import dagster as dg

from vllm_batch_dagster.core.models import Batch, Chunk
from vllm_batch_dagster.core.pauses import Pause
from vllm_batch_dagster.defs.history import CHUNK_RESULTS
from vllm_batch_dagster.defs.partitions import cell_key
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.stages.pausing import model_of


def show_pause(context: dg.AssetExecutionContext, batch: Batch, first: Chunk, pause: Pause) -> None:
    """Say why a run ends early. `first` is the first chunk of the run."""
    context.log.warning(f"{batch.id} {pause.describe()}; finished lines are kept, the rest is sent afterwards")
    metadata: dict[str, dg.TextMetadataValue | dg.TimestampMetadataValue] = {
        "paused_by": dg.MetadataValue.text(pause.cause.value),
        "pause_scope": dg.MetadataValue.text(pause.scope),
        "pause_reason": dg.MetadataValue.text(pause.reason),
        "paused_since": dg.MetadataValue.timestamp(float(pause.since)),
    }
    if pause.until is not None:
        metadata["paused_until"] = dg.MetadataValue.timestamp(float(pause.until))
    cell = cell_key(batch.id, first.index)
    context.log_event(dg.AssetObservation(CHUNK_RESULTS, partition=cell, metadata=metadata))


def may_warm(context: dg.AssetExecutionContext, services: Services, batch: Batch, first: Chunk) -> bool:
    """True unless the chunks of a batch would have to wait for the end of a pause."""
    pause = services.pauses.find(batch.id, model_of(batch, first))
    if pause is not None:
        context.log.info(f"{batch.id} {pause.describe()}; the engine is not started ahead")
    return pause is None
