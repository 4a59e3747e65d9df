"""Deletes what core/retention.py says is due, or only counts it. Called by the `retention` job and `vllm-batch gc`.

Everywhere the record goes before the contents: contents without a record are invisible and a later pass removes them,
a record without contents would be a promise that is broken. A batch goes from the outside in: its Dagster runs and its
partition key, so that nobody can start a run any more; then its chunks in the store, in a transaction that refuses an
open or stale batch; then its folder. Cut anywhere, the next pass finds the rest and goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from vllm_batch_dagster.core.errors import NotFound, StateConflict, StorageFailure
from vllm_batch_dagster.core.models import Batch, File
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore
from vllm_batch_dagster.core.retention import (
    EXPIRY_GRACE_SECONDS,
    SETTLED_SECONDS,
    Kind,
    RetentionReport,
    RetentionRules,
    are_plausible,
    cutoff,
    files_of,
    held_files,
    is_due,
)
from vllm_batch_dagster.core.retention_ports import Disk, GraphHistory, Removed, StoredItem
from vllm_batch_dagster.stages.uploads import sweep_uploads

PAGE = 500
Row = TypeVar("Row", File, Batch)


@dataclass(frozen=True, slots=True)
class RetentionPorts:
    """What retention needs from the outside world."""

    store: BatchStore
    files: FileStore
    disk: Disk
    graph: GraphHistory
    clock: Clock


class Retention:
    """One pass. `dry_run` deletes nothing; `trust_store` deletes contents without a record however many they are."""

    def __init__(
        self, ports: RetentionPorts, rules: RetentionRules, *, dry_run: bool = False, trust_store: bool = False
    ) -> None:
        self._ports, self._rules = ports, rules
        self._dry_run, self._trust_store = dry_run, trust_store
        self._now = ports.clock()
        self.report = RetentionReport(dry_run)

    def run(self) -> RetentionReport:
        """Do the whole pass. Raises StorageFailure when the batch store cannot be used."""
        self.remove_due()
        self._remove_records()
        self._remove_aged(Kind.DATASETS, self._ports.disk.datasets(), cutoff(self._now, self._rules.dataset_days))
        self._remove_aged(Kind.DRAFTS, self._ports.disk.drafts(), self._settled)
        self._remove_orphans()
        self._find_missing_contents()
        self._tidy_graph()
        return self.report

    def remove_due(self) -> RetentionReport:
        """Do the part that the clock decides: expired files and uploads, and the data of batches."""
        self._remove_files()
        self._remove_uploads()
        self._remove_batch_data()
        return self.report

    @property
    def _settled(self) -> int:
        """What was last touched at this time or before is nobody's work in progress."""
        return int(self._now) - SETTLED_SECONDS

    def _remove_files(self) -> None:
        for page in _pages(self._expired_files):
            # Asked for each page: a batch may have been created, or a run started, since the last one.
            held = self._held_files()
            for file in page:
                if file.id in held:
                    self.report.of(Kind.HELD_FILES).add(file.id, file.bytes)
                else:
                    self._remove_file(file)

    def _remove_file(self, file: File) -> None:
        if not self._dry_run:
            try:
                self._ports.store.files.delete(file.id)
            except NotFound:
                return  # its owner was faster
            if not self._succeeds(file.id, lambda: self._ports.files.delete(file.id)):
                return
        self.report.of(Kind.EXPIRED_FILES).add(file.id, file.bytes)

    def _remove_uploads(self) -> None:
        seen: set[str] = set()
        while True:
            swept = sweep_uploads(self._ports.store, self._ports.files, self._now, dry_run=self._dry_run)
            found = dict.fromkeys((*swept.expired, *swept.cleared, *swept.forgotten))
            if found.keys() <= seen:
                return
            for upload_id in found.keys() - seen:
                kind = Kind.REFUSED if upload_id in swept.failed else Kind.EXPIRED_UPLOADS
                self.report.of(kind).add(upload_id)
            self.report.of(Kind.EXPIRED_UPLOADS).bytes += swept.bytes
            if self._dry_run:
                return
            seen = set(found)  # a sweep takes some hundreds at a time

    def _held_files(self) -> frozenset[str]:
        """Ids of the files of batches that are open or stale, or that have a run."""
        batches = list(self._ports.store.batches.open())
        for batch_id in self._ports.graph.busy():
            try:
                batches.append(self._ports.store.batches.get(batch_id))
            except NotFound:
                continue
        return held_files(batches)

    def _remove_batch_data(self) -> None:
        for page in _pages(self._ended_batches):
            expiries = self._ports.store.retention.expiries({id for batch in page for id in files_of(batch)})
            for batch in page:
                if is_due(batch, expiries, self._rules, self._now):
                    self._purge(batch.id)

    def _purge(self, batch_id: str) -> None:
        folder = self._ports.disk.batch(batch_id)
        size = self._ports.disk.size(folder) if folder else 0
        removed = self._clear_graph(batch_id)
        if removed is None or not self._clear_store(batch_id):
            self.report.of(Kind.BUSY_BATCHES).add(batch_id)
            return
        if folder is None or self._remove(folder):
            self.report.of(Kind.BATCH_DATA).add(batch_id, size)
        if removed.runs:
            self.report.of(Kind.DAGSTER_RUNS).add(batch_id, removed.bytes, removed.runs)

    def _clear_graph(self, batch_id: str) -> Removed | None:
        """Delete what Dagster has of the batch, None when one of its runs is unfinished.

        Asked again afterwards: somebody may have started a run before the partition key was gone.
        """
        graph = self._ports.graph
        if graph.is_busy(batch_id):
            return None
        removed = graph.forget(batch_id, dry_run=self._dry_run)
        return None if graph.is_busy(batch_id) else removed

    def _clear_store(self, batch_id: str) -> bool:
        """Delete the chunks of the batch. False when it is in use again, or gone."""
        if self._dry_run:
            return True
        try:
            self._ports.store.retention.purge(batch_id, int(self._now))
        except (NotFound, StateConflict):
            return False
        return True

    def _remove_records(self) -> None:
        limit = cutoff(self._now, self._rules.record_days)
        if limit is None:
            return

        def purged(after: str) -> Sequence[Batch]:
            return self._ports.store.retention.ended(after=after, limit=PAGE, by=limit, purged=True)

        for page in _pages(purged):
            for batch in page:
                self._remove_record(batch.id)

    def _remove_record(self, batch_id: str) -> None:
        if not self._dry_run:
            try:
                self._ports.store.retention.forget(batch_id)
            except (NotFound, StateConflict):
                return
        self.report.of(Kind.BATCH_RECORDS).add(batch_id)

    def _remove_aged(self, kind: Kind, items: Iterator[StoredItem], limit: int | None) -> None:
        if limit is not None:
            for item in items:
                if item.modified_at <= limit:
                    self._remove_item(kind, item)

    def _remove_item(self, kind: Kind, item: StoredItem) -> None:
        size = self._ports.disk.size(item)
        if self._remove(item):
            self.report.of(kind).add(item.name, size)

    def _remove(self, item: StoredItem) -> bool:
        return self._dry_run or self._succeeds(str(item.path), lambda: self._ports.disk.remove(item))

    def _succeeds(self, name: str, remove: Callable[[], None]) -> bool:
        """What the disk does not let go is reported; it must not keep everything behind it alive."""
        try:
            remove()
        except StorageFailure:
            self.report.of(Kind.REFUSED).add(name)
            return False
        return True

    def _remove_orphans(self) -> None:
        """Remove contents and folders that no record names: of processes that died between the two.

        Looked for twice, first to count: if most contents have no record, the records are what is missing.
        """
        disk = self._ports.disk
        for items, find in ((disk.contents, self._unknown_files), (disk.batches, self._unknown_batches)):
            total, orphans = sum(1 for _ in items()), sum(1 for _ in find(items()))
            doubtful = not self._trust_store and not are_plausible(orphans, total)
            for item in find(items()):
                if doubtful:
                    self.report.of(Kind.DOUBTFUL_ORPHANS).add(item.name, disk.size(item))
                else:
                    self._remove_item(Kind.ORPHANS, item)
        self._remove_leftovers()

    def _unknown_files(self, items: Iterator[StoredItem]) -> Iterator[StoredItem]:
        aged = (item for item in items if item.modified_at <= self._settled)
        while page := list(islice(aged, PAGE)):
            known = self._ports.store.retention.expiries([item.name for item in page])
            yield from (item for item in page if item.name not in known)

    def _unknown_batches(self, items: Iterator[StoredItem]) -> Iterator[StoredItem]:
        for item in items:
            if item.modified_at <= self._settled and self._find_batch(item.name) is None:
                yield item

    def _remove_leftovers(self) -> None:
        """Remove the folders of batches that were purged by a pass that died before it came to the folder."""
        for item in self._ports.disk.batches():
            batch = self._find_batch(item.name)
            if batch is not None and batch.purged_at is not None:
                self._remove_item(Kind.BATCH_DATA, item)

    def _find_batch(self, batch_id: str) -> Batch | None:
        try:
            return self._ports.store.batches.get(batch_id)
        except NotFound:
            return None

    def _find_missing_contents(self) -> None:
        """Report the records without contents. They are left: whoever asks for the file shall be told."""
        for page in _pages(lambda after: self._ports.store.retention.files(after=after, limit=PAGE)):
            missing = [file for file in page if not self._ports.disk.has_contents(file.id)]
            # Deleted since the page was read?
            known = self._ports.store.retention.expiries([file.id for file in missing])
            for file in missing:
                if file.id in known:
                    self.report.of(Kind.MISSING_CONTENTS).add(file.id, file.bytes)

    def _tidy_graph(self) -> None:
        removed = self._ports.graph.tidy(self._now, dry_run=self._dry_run)
        if removed.runs:
            self.report.of(Kind.DAGSTER_RUNS).add("retention", removed.bytes, removed.runs)
        for run_id in self._ports.graph.stuck(self._now):
            self.report.of(Kind.STUCK_RUNS).add(run_id)

    def _expired_files(self, after: str) -> Sequence[File]:
        limit = int(self._now) - EXPIRY_GRACE_SECONDS
        return self._ports.store.retention.files(after=after, limit=PAGE, expired_by=limit)

    def _ended_batches(self, after: str) -> Sequence[Batch]:
        return self._ports.store.retention.ended(after=after, limit=PAGE, by=self._settled, purged=False)


def _pages(read: Callable[[str], Sequence[Row]]) -> Iterator[Sequence[Row]]:
    """Yield pages until one is empty. `read` gets the last id of the page before."""
    page = read("")
    while page:
        yield page
        page = read(page[-1].id)
