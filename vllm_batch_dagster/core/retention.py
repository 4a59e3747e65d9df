"""Decides what may be deleted: expired files, the working data of ended batches, contents that no record names.

Pure; called by stages/retention.py, which reads the stores, deletes, and counts what went.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vllm_batch_dagster.core.models import DAY_SECONDS, Batch
from vllm_batch_dagster.core.states import TIMESTAMP_FIELD

# A batch that was created just before its input expired is surely in the store by then, so its input is seen as held.
EXPIRY_GRACE_SECONDS = 60
# What has no record may still get one (a merge proves its files first), and a batch's runs are looked at afterwards.
SETTLED_SECONDS = DAY_SECONDS
# So few may go whatever their share.
_FEW_ORPHANS = 10
MOST_NAMES = 20


class Kind(StrEnum):
    """What retention speaks of. The first block goes, the second stays and is reported."""

    EXPIRED_FILES = "expired files"
    EXPIRED_UPLOADS = "expired uploads"
    BATCH_DATA = "batch data"
    BATCH_RECORDS = "batch records"
    DATASETS = "datasets"
    DAGSTER_RUNS = "Dagster runs"
    DRAFTS = "half-written files"
    ORPHANS = "contents without a record"

    REFUSED = "what the disk does not let go"
    HELD_FILES = "expired files that a batch still reads"
    BUSY_BATCHES = "batches with an unfinished run"
    MISSING_CONTENTS = "records without contents"
    STUCK_RUNS = "runs that never started"
    DOUBTFUL_ORPHANS = "contents without a record, too many to be true"


STAYS = (
    Kind.REFUSED,
    Kind.HELD_FILES,
    Kind.BUSY_BATCHES,
    Kind.MISSING_CONTENTS,
    Kind.STUCK_RUNS,
    Kind.DOUBTFUL_ORPHANS,
)


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """Days after the end of a batch (a data set: after it was written). 0: no such limit."""

    batch_days: int = 30
    record_days: int = 0
    dataset_days: int = 0


@dataclass(slots=True)
class Tally:
    """How many of a kind, their bytes, and the first few names."""

    count: int = 0
    bytes: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str, size: int = 0, count: int = 1) -> None:
        self.count += count
        self.bytes += size
        if len(self.names) < MOST_NAMES:
            self.names.append(name)


@dataclass(slots=True)
class RetentionReport:
    """What went (or would go, when `dry_run`), and what was found and left."""

    dry_run: bool = False
    tallies: dict[Kind, Tally] = field(default_factory=dict)

    def of(self, kind: Kind) -> Tally:
        return self.tallies.setdefault(kind, Tally())

    @property
    def bytes_freed(self) -> int:
        return sum(tally.bytes for kind, tally in self.tallies.items() if kind not in STAYS)

    @property
    def is_empty(self) -> bool:
        """True when nothing went."""
        return not any(tally.count for kind, tally in self.tallies.items() if kind not in STAYS)


def cutoff(now: float, days: int) -> int | None:
    """Return the time before which something must lie to be `days` old; None when there is no limit."""
    return int(now) - days * DAY_SECONDS if days else None


def ended_at(batch: Batch) -> int | None:
    """Return when `batch` ended, None while it has not."""
    return getattr(batch, TIMESTAMP_FIELD[batch.status]) if batch.is_terminal else None


def files_of(batch: Batch) -> tuple[str, ...]:
    """Return the ids of its input, output and error file."""
    named = (batch.input_file_id, batch.output_file_id, batch.error_file_id)
    return tuple(file_id for file_id in named if file_id)


def is_due(batch: Batch, expiries: Mapping[str, int | None], rules: RetentionRules, now: float) -> bool:
    """True when the working data of `batch` may go: it ended `batch_days` ago, or none of its files is left, so that
    nothing could be run again or downloaded. Before it has settled it stays in any case.

    `expiries` has the `expires_at` of the files that have a record.
    """
    end = ended_at(batch)
    if end is None or batch.is_stale or batch.purged_at is not None or now < end + SETTLED_SECONDS:
        return False
    limit = cutoff(now, rules.batch_days)
    if limit is not None and end <= limit:
        return True
    return all(file_id not in expiries or is_past(expiries[file_id], now) for file_id in files_of(batch))


def is_past(expires_at: int | None, now: float) -> bool:
    """True when a file with this `expires_at` may be deleted."""
    return expires_at is not None and expires_at + EXPIRY_GRACE_SECONDS <= now


def held_files(batches: Collection[Batch]) -> frozenset[str]:
    """Return the ids of all files of `batches`: those that are open, stale, or have a run."""
    return frozenset(file_id for batch in batches for file_id in files_of(batch))


def are_plausible(orphans: int, total: int) -> bool:
    """False when so many contents have no record that the store is more likely to be the wrong one (another database,
    an empty one) than the contents are to be leftovers."""
    return orphans <= _FEW_ORPHANS or orphans * 2 <= total
