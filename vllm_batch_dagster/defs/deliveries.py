"""The `deliveries` asset: gives the merged results of a batch to every enabled handler.

A handler that fails makes this asset fail, visible and rerunnable in the UI; it never changes the batch.
"""

from collections.abc import Iterator
from itertools import chain

import dagster as dg

from handlers.base import ResultHandler, Results
from handlers.registry import BrokenHandler, load_handlers
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import FileStore
from vllm_batch_dagster.defs.partitions import batches
from vllm_batch_dagster.defs.services import Services

DELIVERED, OFF, FAILED, BROKEN = "delivered", "off", "failed", "broken"


def deliveries() -> dg.AssetsDefinition:
    @dg.asset(name="deliveries", partitions_def=batches, deps=["merged_output"], group_name="batch", kinds={"python"})
    def deliver(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> Iterator[object]:
        """The results of a batch in the hands of each enabled result handler."""
        batch = services.store.batches.get(context.partition_key)
        outcomes = {name: outcome for name, outcome in deliver_batch(batch, services.files)}
        failed = [name for name, outcome in outcomes.items() if outcome.startswith(FAILED)]
        if failed:
            raise dg.Failure(f"delivery failed: {outcomes}. The batch is unharmed; run this asset again")
        yield dg.MaterializeResult(
            metadata={
                "delivered": sum(outcome == DELIVERED for outcome in outcomes.values()),
                "handlers": dg.MetadataValue.json(outcomes),
            }
        )

    return deliver


def deliver_batch(batch: Batch, files: FileStore) -> Iterator[tuple[str, str]]:
    """Run each handler and yield (its name, what came of it)."""
    for handler in load_handlers():
        if isinstance(handler, BrokenHandler):
            yield handler.name, f"{BROKEN}: {handler.problem}"
        elif not handler.enabled():
            yield handler.name(), OFF
        else:
            yield handler.name(), _deliver(handler, batch, files)


def _deliver(handler: ResultHandler, batch: Batch, files: FileStore) -> str:
    results = Results(lambda: _result_lines(batch, files))
    try:
        done = handler.handle(batch.id, results, batch.metadata or {})
    except Exception as error:  # noqa: BLE001 - a plug-in's error is its own; it is shown and the others go on
        return f"{FAILED}: {type(error).__name__}: {error}"
    return DELIVERED if done else f"{FAILED}: the handler returned False"


def _result_lines(batch: Batch, files: FileStore) -> Iterator[bytes]:
    """Yield the lines of the output file, then of the error file, as they are on disk."""
    wanted = filter(None, (batch.output_file_id, batch.error_file_id))
    return chain.from_iterable(_lines_of(file_id, files) for file_id in wanted)


def _lines_of(file_id: str, files: FileStore) -> Iterator[bytes]:
    with files.open(file_id) as lines:
        yield from lines
