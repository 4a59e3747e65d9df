"""Deletes what Dagster keeps of a batch: runs, their events, their files on disk, the partition key. See GraphHistory.

Dagster has no such call: `delete_run` leaves tags, check results and, on SQLite, a database file and a log folder per
run, and nothing deletes the events that were reported without a run (unused chunk slots). So this module reaches into
its tables; tests/defs would notice a change. The row of a run goes last, so that a purge that was cut finds it again.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus, RunRecord, RunsFilter
from dagster._core.instance.utils import RUNLESS_RUN_ID
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetEventTagsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.runs.schema import RunTagsTable
from dagster._core.storage.runs.sql_run_storage import SqlRunStorage
from sqlalchemy import Connection, select

from vllm_batch_dagster.core.models import DAY_SECONDS
from vllm_batch_dagster.core.retention_ports import Removed
from vllm_batch_dagster.defs.history import BATCH_TAG, CHUNK_RESULTS, read_active_batches, read_graph_state
from vllm_batch_dagster.defs.partitions import batches, cell_key

RETENTION_JOB = "retention"
KEEP_OWN_RUNS_SECONDS = 7 * DAY_SECONDS
STUCK_SECONDS = DAY_SECONDS

_BATCHES = str(batches.name)
_RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
_BATCH_TAGS = (BATCH_TAG, "dagster/partition", "dagster/partition/batch")
_ENDED = (DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED)
_MOST_STUCK = 20


class DagsterHistory:
    """See GraphHistory. `slots` is the number of chunk slots of a batch."""

    def __init__(self, instance: DagsterInstance, slots: int) -> None:
        self._instance, self._slots = instance, slots

    def busy(self) -> Collection[str]:
        return read_active_batches(self._instance).unfinished

    def is_busy(self, batch_id: str) -> bool:
        active = read_active_batches(self._instance)
        return read_graph_state(self._instance, batch_id, (), active, time.time()).active

    def forget(self, batch_id: str, *, dry_run: bool = False) -> Removed:
        runs = size = 0
        for record in self._runs_of(batch_id):
            runs, size = runs + 1, size + self._remove(record.dagster_run.run_id, dry_run=dry_run)
        if not dry_run:
            self._delete_runless_events(batch_id)
            self._instance.delete_dynamic_partition(_BATCHES, batch_id)
        return Removed(runs, size)

    def tidy(self, now: float, *, dry_run: bool = False) -> Removed:
        runs = size = 0
        for record in self._instance.get_run_records(RunsFilter(job_name=RETENTION_JOB, statuses=list(_ENDED))):
            if (record.end_time or now) <= now - KEEP_OWN_RUNS_SECONDS:
                runs, size = runs + 1, size + self._remove(record.dagster_run.run_id, dry_run=dry_run)
        return Removed(runs, size)

    def stuck(self, now: float) -> Sequence[str]:
        waiting = RunsFilter(statuses=[DagsterRunStatus.NOT_STARTED])
        records = self._instance.get_run_records(waiting, limit=_MOST_STUCK, ascending=True)
        old = (record for record in records if record.create_timestamp.timestamp() <= now - STUCK_SECONDS)
        return [record.dagster_run.run_id for record in old]

    def _runs_of(self, batch_id: str) -> Iterator[RunRecord]:
        """Yield the ended runs of a batch, whoever launched them."""
        cells = [str(cell_key(batch_id, index)) for index in range(self._slots)]
        wanted = [(tag, [batch_id]) for tag in _BATCH_TAGS] + [(tag, [*cells, batch_id]) for tag in _RANGE_TAGS]
        seen: set[str] = set()
        for tag, values in wanted:
            for record in self._instance.get_run_records(RunsFilter(tags={tag: values}, statuses=list(_ENDED))):
                run_id = record.dagster_run.run_id
                if run_id not in seen and not self._serves_another(record, batch_id):
                    seen.add(run_id)
                    yield record

    def _serves_another(self, record: RunRecord, batch_id: str) -> bool:
        """True for a backfill over several batches, as long as one of the others is there."""
        ends = {record.dagster_run.tags[tag].split("|")[0] for tag in _RANGE_TAGS if tag in record.dagster_run.tags}
        return any(self._instance.has_dynamic_partition(_BATCHES, other) for other in ends - {batch_id})

    def _remove(self, run_id: str, *, dry_run: bool) -> int:
        """Delete one run and return the bytes of its files."""
        databases, logs = self._databases(run_id), self._log_folder(run_id)
        size = sum(path.stat().st_size for path in (*databases, *_files_below(logs)))
        if not dry_run:
            self._delete_events(run_id)
            for path in databases:
                path.unlink(missing_ok=True)
            self._instance.compute_log_manager.delete_logs(prefix=[run_id])
            self._delete_row(run_id)
        return size

    def _databases(self, run_id: str) -> list[Path]:
        """Return the files in which SQLite keeps the events of a run."""
        storage = self._instance.event_log_storage
        if not isinstance(storage, SqliteEventLogStorage):
            return []
        shard = storage.path_for_shard(run_id)
        return [path for suffix in ("", "-wal", "-shm") if (path := Path(shard + suffix)).exists()]

    def _log_folder(self, run_id: str) -> Path | None:
        logs = self._instance.compute_log_manager
        if not isinstance(logs, LocalComputeLogManager):
            return None
        return Path(logs.get_captured_local_path([run_id, "any"], "out")).parent

    def _delete_events(self, run_id: str) -> None:
        storage = self._instance.event_log_storage
        storage.delete_events(run_id)
        if isinstance(storage, SqlEventLogStorage):
            checks = AssetCheckExecutionsTable
            with storage.index_connection() as connection:
                connection.execute(checks.delete().where(checks.c.run_id == run_id))

    def _delete_row(self, run_id: str) -> None:
        runs = self._instance.run_storage
        runs.delete_run(run_id)
        if isinstance(runs, SqlRunStorage):  # SQLite leaves them
            with runs.connect() as connection:
                connection.execute(RunTagsTable.delete().where(RunTagsTable.c.run_id == run_id))

    def _delete_runless_events(self, batch_id: str) -> None:
        """Delete what was shown of the batch outside of any run: unused slots, chunks that the merge sealed."""
        storage = self._instance.event_log_storage
        if not isinstance(storage, SqlEventLogStorage):
            return
        cells = [str(cell_key(batch_id, index)) for index in range(self._slots)]
        with storage.index_connection() as connection:
            _delete_shown(connection, cells)
        if isinstance(storage, SqliteEventLogStorage):  # it keeps them twice
            with storage.run_connection(RUNLESS_RUN_ID) as connection:
                _delete_shown(connection, cells)


def _delete_shown(connection: Connection, cells: Sequence[str]) -> None:
    events, tags = SqlEventLogStorageTable, AssetEventTagsTable
    shown = (
        (events.c.asset_key == CHUNK_RESULTS.to_string())
        & (events.c.dagster_event_type == DagsterEventType.ASSET_MATERIALIZATION.value)
        & events.c.partition.in_(cells)
        & (events.c.run_id == RUNLESS_RUN_ID)
    )
    ids = [row[0] for row in connection.execute(select(events.c.id).where(shown))]
    connection.execute(tags.delete().where(tags.c.event_id.in_(ids)))
    connection.execute(events.delete().where(events.c.id.in_(ids)))


def _files_below(folder: Path | None) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file()) if folder else iter(())
