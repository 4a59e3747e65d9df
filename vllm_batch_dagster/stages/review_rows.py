"""The data set of reviews on disk. Written by stages/pulling.py, read by whoever uses reviews.

    reviewed/pull=<mark>-<source>-<digest>/part-00000.parquet    the rows of one pull
    reviewed/<source>.mark                                       from where the next pull of a project goes on

A mark is the time of the newest change that the project had when the pull began.
"""

import hashlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import polars

from vllm_batch_dagster.core.reviewed import Review
from vllm_batch_dagster.stages.publication import make_folder, publish, sync_folder

DATASET = "reviewed"
ROWS_PER_PART = 2_000
KEYS_AT_ONCE = 2_000
_TYPES: Mapping[object, Any] = {
    str: polars.String,
    int: polars.Int64,
    float: polars.Float64,
    Sequence[str]: polars.List(polars.String),
}


class ReviewRows:
    """All versions of all annotations that were pulled. `folder` need not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mark(self, source: str) -> str | None:
        """Return the mark of a source, None before its first pull. Times as in core/reviewed.py."""
        try:
            return self._mark_path(source).read_text()
        except FileNotFoundError:
            return None

    def set_mark(self, source: str, mark: str) -> None:
        """For after the rows up to the mark are published. Raises StorageFailure."""
        with publish(self._mark_path(source)) as file:
            file.write(mark.encode())

    def known(self, source: str, task_ids: Collection[int]) -> Sequence[Review]:
        """Return the versions of some tasks."""
        found = self._scan()
        if found is None:
            return []
        wanted = (polars.col("source") == source) & polars.col("task_id").is_in(list(task_ids))
        return list(_rows(found.filter(wanted)))

    def histories(self) -> Iterator[Sequence[Review]]:
        """Yield all versions of each line, oldest first, in the order of their export keys; a few thousand lines are
        in memory at a time."""
        found = self._scan()
        if found is None:
            return
        keys = found.select(polars.col("export_key").unique()).collect()["export_key"].sort()
        for start in range(0, len(keys), KEYS_AT_ONCE):
            part = keys[start : start + KEYS_AT_ONCE]
            wanted = polars.col("export_key").is_between(polars.lit(part[0]), polars.lit(part[-1]))
            rows = _rows(found.filter(wanted).sort("export_key", "updated_at", "annotation_id"))
            for _key, versions in groupby(rows, attrgetter("export_key")):
                yield list(versions)

    def _scan(self) -> polars.LazyFrame | None:
        parts = [part for pull in self._pulls() for part in sorted(pull.glob("*.parquet"))]
        return polars.scan_parquet(parts) if parts else None

    def _mark_path(self, source: str) -> Path:
        return self.folder / f"{_short(source)}.mark"

    def _pulls(self) -> Sequence[Path]:
        return sorted(path for path in self.folder.glob("pull=*") if path.suffix != ".new")


class PullFolder:
    """The rows of one pull as they come. Nothing is visible before `publish`; one at a time (see composition.py)."""

    def __init__(self, folder: Path) -> None:
        self._fresh = make_folder(folder) / "pull=unfinished.new"
        shutil.rmtree(self._fresh, ignore_errors=True)
        self._fresh.mkdir()
        self._digest = hashlib.sha256()
        self._rows: list[Review] = []
        self._parts = 0
        self.count = 0

    def add(self, rows: Iterable[Review]) -> None:
        for row in rows:
            self._digest.update(repr(row.version).encode())
            self._rows.append(row)
            self.count += 1
            if len(self._rows) >= ROWS_PER_PART:
                self._flush()

    def publish(self, source: str, mark: str) -> Path | None:
        """Show the rows as one folder; None when there are none. The same rows get the same name."""
        self._flush()
        if not self.count:
            shutil.rmtree(self._fresh)
            return None
        name = f"pull={_compact(mark)}-{_short(source)}-{self._digest.hexdigest()[:8]}"
        target = self._fresh.with_name(name)
        sync_folder(self._fresh)
        self._fresh.rename(target)
        sync_folder(target.parent)
        return target

    def _flush(self) -> None:
        if self._rows:
            path = self._fresh / f"part-{self._parts:05d}.parquet"
            write_rows(path, self._rows)
            self._rows.clear()
            self._parts += 1


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclass values of one kind, at least one, as a Parquet file, durably."""
    schema = {field.name: _TYPES[field.type] for field in fields(rows[0])}
    polars.DataFrame([asdict(row) for row in rows], schema=schema).write_parquet(path, compression="zstd")
    sync_folder(path)


def _rows(found: polars.LazyFrame) -> Iterator[Review]:
    return (Review(**row) for row in found.collect().iter_rows(named=True))


def _short(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def _compact(mark: str) -> str:
    return "".join(letter for letter in mark if letter.isalnum())
