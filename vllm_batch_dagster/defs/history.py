"""Reads what Dagster knows of a batch: newest materializations and runs. The only place that asks its storage.

`get_latest_storage_id_by_partition` is not in Dagster's documented API (the public query reads whole events and is
20 times slower at 100,000 cells); it is wrapped here once, and tests/defs would notice a change.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import dagster as dg
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from vllm_batch_dagster.core.reconciling import FREE_FAILURES, GraphState, ShownResult
from vllm_batch_dagster.defs.jobs import DELIVERING
from vllm_batch_dagster.defs.partitions import BATCH_DIMENSION, cell_key, split_cell

BATCH_TAG = "batch"
EPOCH_METADATA = "attempt"
CHUNK_RESULTS = dg.AssetKey("chunk_results")

_RANGE_START_TAG = "dagster/asset_partition_range_start"
_PARTITION_TAG = "dagster/partition"
_BATCH_PARTITION_TAG = f"dagster/partition/{BATCH_DIMENSION}"
_WILL_RETRY_TAG = "dagster/will_retry"
_RETRIED_BY_TAG = "dagster/auto_retry_run_id"
_RETRY_NUMBER_TAG = "dagster/retry_number"
_FAILURE_REASON_TAG, _STEP_FAILURE = "dagster/failure_reason", "STEP_FAILURE"
_RETRY_GRACE_SECONDS = 60.0
_RECENT = 20

_ENDED = (DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED)
_WAITING = (DagsterRunStatus.NOT_STARTED, DagsterRunStatus.QUEUED)
_UNFINISHED = tuple(status for status in DagsterRunStatus if status not in _ENDED)


@dataclass(frozen=True, slots=True)
class ActiveBatches:
    """Ids of the batches that have an unfinished run, whoever launched it; `begun`: one that has left the queue;
    `delivering`: one that ends with its deliveries."""

    unfinished: Collection[str] = frozenset()
    begun: Collection[str] = frozenset()
    delivering: Collection[str] = frozenset()


def read_active_batches(instance: DagsterInstance) -> ActiveBatches:
    runs = instance.get_runs(filters=RunsFilter(statuses=list(_UNFINISHED)))
    named = [(batch_id, run.status) for run in runs if (batch_id := batch_of(run))]
    begun = frozenset(batch_id for batch_id, status in named if status not in _WAITING)
    delivering = frozenset(found for run in runs if run.job_name in DELIVERING and (found := batch_of(run)))
    return ActiveBatches(frozenset(batch_id for batch_id, _status in named), begun, delivering)


def batch_of(run: DagsterRun) -> str | None:
    """Return the batch of a run: from our tag, or from the partition tags of a run launched in the UI."""
    for tag in (BATCH_TAG, _BATCH_PARTITION_TAG):
        if tag in run.tags:
            return run.tags[tag]
    key = run.tags.get(_RANGE_START_TAG) or run.tags.get(_PARTITION_TAG)
    return key.split("|")[0] if key else None


def is_by_hand(run: DagsterRun) -> bool:
    """True when a person launched the run: without our tag, or as a re-execution that is no retry of the daemon."""
    return BATCH_TAG not in run.tags or (run.parent_run_id is not None and _RETRY_NUMBER_TAG not in run.tags)


def read_graph_state(
    instance: DagsterInstance, batch_id: str, chunks: Iterable[int], runs: ActiveBatches, now: float
) -> GraphState:
    """Return the state of one batch. `runs` is the answer of `read_active_batches`."""
    filters = RunsFilter(tags={BATCH_TAG: batch_id}, statuses=list(_ENDED))
    recent = instance.get_run_records(filters=filters, limit=_RECENT)
    last_ended = max((record.end_time or 0.0 for record in recent), default=0.0)
    awaited = bool(recent) and _awaits_retry(recent[0].dagster_run) and now < last_ended + _RETRY_GRACE_SECONDS
    active = batch_id in runs.unfinished or awaited
    return GraphState(
        materialized=_newest_materializations(instance, batch_id, chunks),
        active=active,
        waiting=active and batch_id not in runs.begun,
        newest_run=recent[0].storage_id if recent else 0,
        failures=_count_failures([record.dagster_run for record in recent]),
        last_ended=last_ended,
    )


def _count_failures(recent: Sequence[DagsterRun]) -> int:
    """Count the runs that failed since the last success. Deaths of a process count for no more than a short pause: that
    it was killed says nothing against the next try, and what it had answered stays."""
    failed = list(takewhile(lambda run: run.status is not DagsterRunStatus.SUCCESS, recent))
    deaths = sum(_is_death(run) for run in failed)
    return max(len(failed) - deaths, min(len(failed), FREE_FAILURES))


def _is_death(run: DagsterRun) -> bool:
    """True when no step has failed: the worker is gone, or never came."""
    return run.status is DagsterRunStatus.FAILURE and run.tags.get(_FAILURE_REASON_TAG) != _STEP_FAILURE


def _awaits_retry(run: DagsterRun) -> bool:
    """True for a failed run that the daemon is going to retry and has not retried yet."""
    failed = run.status is DagsterRunStatus.FAILURE
    return failed and run.tags.get(_WILL_RETRY_TAG) == "true" and _RETRIED_BY_TAG not in run.tags


def _newest_materializations(instance: DagsterInstance, batch_id: str, chunks: Iterable[int]) -> dict[int, int]:
    cells = {str(cell_key(batch_id, index)) for index in chunks}
    if not cells:
        return {}
    newest = instance.event_log_storage.get_latest_storage_id_by_partition(
        CHUNK_RESULTS, dg.DagsterEventType.ASSET_MATERIALIZATION, partitions=cells
    )
    return {split_cell(cell)[1]: storage_id for cell, storage_id in newest.items()}


def read_shown_result(instance: DagsterInstance, batch_id: str, index: int, run: DagsterRun) -> ShownResult | None:
    """Return the newest materialization of a chunk as `run` must see it, or None when there is none."""
    wanted = dg.AssetRecordsFilter(asset_key=CHUNK_RESULTS, asset_partitions=[str(cell_key(batch_id, index))])
    records = instance.fetch_materializations(wanted, limit=1).records
    if not records:
        return None
    record = records[0]
    materialization = record.asset_materialization
    epoch = materialization.metadata.get(EPOCH_METADATA) if materialization else None
    requested = instance.get_run_record_by_id(run.run_id)
    younger = requested is not None and record.timestamp >= requested.create_timestamp.timestamp()
    return ShownResult(
        epoch=int(str(epoch.value)) if epoch is not None else 0,
        answers_this_request=younger or record.run_id in forerunners(instance, run),
    )


def forerunners(instance: DagsterInstance, run: DagsterRun) -> Sequence[str]:
    """Return the ids of the failed runs that `run` retries. Who re-executes a run that succeeded wants new answers."""
    found: list[str] = []
    parent_id = run.parent_run_id
    while parent_id and (parent := instance.get_run_by_id(parent_id)) and not parent.is_success:
        found.append(parent_id)
        parent_id = parent.parent_run_id
    return found
