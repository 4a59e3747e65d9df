"""What retention needs from the outside world: the records of every project, what lies on disk, what Dagster keeps.

Beside `ports.py`, because nothing on the data path uses these.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vllm_batch_dagster.core.models import Batch, File


class RetentionRecords(Protocol):
    """The batch store as retention sees it. Listings are in the order of ids, from behind `after`, which need not
    exist: what was listed may be deleted before the next page is asked for."""

    def files(self, *, after: str = "", limit: int, expired_by: int | None = None) -> Sequence[File]:
        """Files of all projects, or only those whose `expires_at` is at most `expired_by`."""

    def expiries(self, file_ids: Collection[str]) -> Mapping[str, int | None]:
        """The `expires_at` of those files that have a record."""

    def ended(self, *, after: str = "", limit: int, by: int, purged: bool) -> Sequence[Batch]:
        """Batches that ended at `by` or before and are not stale, with or without their working data. Those with a
        pending delivery are left out."""

    def purge(self, batch_id: str, now: int) -> None:
        """Delete the chunks and attempts of a batch and set its `purged_at`, in one transaction. Doing it again
        changes nothing. Raises NotFound, and StateConflict while it is open or stale or has a pending
        delivery."""

    def forget(self, batch_id: str) -> None:
        """Delete the record of a purged batch with its deliveries and outbox events. Raises NotFound, StateConflict
        before `purge`."""


@dataclass(frozen=True, slots=True)
class StoredItem:
    """A file or a folder on disk, named as in its parent. `modified_at` in unix seconds."""

    name: str
    path: Path
    modified_at: float


class Disk(Protocol):
    """What lies in the state folder, whether or not a record names it. Nothing is held in memory."""

    def contents(self) -> Iterator[StoredItem]:
        """Contents of files, by file id."""

    def drafts(self) -> Iterator[StoredItem]:
        """What is being written, or was when its process died."""

    def batches(self) -> Iterator[StoredItem]:
        """Working folders, by batch id."""

    def datasets(self) -> Iterator[StoredItem]:
        """Data sets, one folder per batch."""

    def batch(self, batch_id: str) -> StoredItem | None:
        """The working folder of a batch."""

    def has_contents(self, file_id: str) -> bool: ...

    def size(self, item: StoredItem) -> int:
        """Bytes, with everything below it."""

    def remove(self, item: StoredItem) -> None:
        """Harmless when absent. Raises StorageFailure."""


@dataclass(frozen=True, slots=True)
class Removed:
    """Runs that went, and the bytes of their files."""

    runs: int = 0
    bytes: int = 0


class GraphHistory(Protocol):
    """What Dagster keeps of the batches."""

    def busy(self) -> Collection[str]:
        """Ids of the batches that have an unfinished run, or one that is about to be retried."""

    def is_busy(self, batch_id: str) -> bool: ...

    def forget(self, batch_id: str, *, dry_run: bool = False) -> Removed:
        """Delete the runs of a batch with their events, files and logs, and last its partition key. Harmless when
        there is nothing left."""

    def tidy(self, now: float, *, dry_run: bool = False) -> Removed:
        """Delete the older runs of retention itself."""

    def stuck(self, now: float) -> Sequence[str]:
        """Ids of runs that were asked for a day ago and never started."""


class NoHistory:
    """See GraphHistory: where there is no Dagster instance."""

    def busy(self) -> Collection[str]:
        return ()

    def is_busy(self, batch_id: str) -> bool:
        return False

    def forget(self, batch_id: str, *, dry_run: bool = False) -> Removed:
        return Removed()

    def tidy(self, now: float, *, dry_run: bool = False) -> Removed:
        return Removed()

    def stuck(self, now: float) -> Sequence[str]:
        return ()
