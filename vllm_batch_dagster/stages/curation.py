"""Selects from a finished batch by rules: a Parquet data set for training, and one of the rows that a person reviews.

Called by the `curated_export` asset. A batch's folder of each set is replaced as a whole, so a rerun doubles nothing.
What grows with the batch in memory are numbers of lines and 16-byte hashes, never texts.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars

from vllm_batch_dagster.core.candidates import COLUMNS
from vllm_batch_dagster.core.curation_rules import CurationRules, Duplicates, Filters
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import BatchStore, FileStore, Workspace
from vllm_batch_dagster.core.selection import REFUSED, SELECTION, choose, refusal
from vllm_batch_dagster.core.similarity import NearDuplicates
from vllm_batch_dagster.stages.candidates import write_candidates
from vllm_batch_dagster.stages.publication import sync_folder

DATASET = "curated"
REVIEW = "review"
# What a person's task is made of, beside the row itself.
JUDGED = ("answers", "is_cut", "breaks_schema", "mean_logprob", "disagreement")
_LINE = {"line": polars.Int64}


@dataclass(frozen=True, slots=True)
class CurationReport:
    """What was selected. `refused` counts rows by the filter of the data set that they broke; `bytes` on disk.
    `selected` rows are for review, in `review_path`; `selected_by_rule` counts a row under every rule that chose it."""

    path: Path
    kept: int
    refused: Mapping[str, int]
    bytes: int
    review_path: Path
    selected: int
    selected_by_rule: Mapping[str, int]


def curate_batch(
    batch: Batch, store: BatchStore, files: FileStore, workspace: Workspace, rules: CurationRules
) -> CurationReport:
    """Select from the merged results of `batch` and publish both folders."""
    folder, review = (workspace.dataset_path(name, batch.id) for name in (DATASET, REVIEW))
    refused: Counter[str] = Counter()
    scratch = _make_draft(folder, "rows")
    try:
        chunks = store.chunks.list(batch.id)
        parts = write_candidates(batch, chunks, files, workspace, rules, scratch, refused)
        kept = _publish_dataset(folder, parts, rules, refused)
        selection = _select(parts, rules)
        _publish_review(review, parts, selection)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.iterdir())
    by_rule = Counter(selection["rules"].explode().to_list()) if len(selection) else Counter()
    return CurationReport(folder, kept, dict(refused), size, review, len(selection), dict(by_rule))


def _publish_dataset(folder: Path, parts: Sequence[Path], rules: CurationRules, refused: Counter[str]) -> int:
    kept = _pass_filters(parts, rules.dataset, refused)
    fresh = _make_draft(folder)
    _write_parts(parts, fresh, lambda rows: rows.select(COLUMNS).join(kept.lazy(), on="line", how="semi"))
    _replace(folder, fresh)
    return len(kept)


def _select(parts: Sequence[Path], rules: CurationRules) -> polars.DataFrame:
    if not parts:
        return polars.DataFrame(schema=SELECTION)
    passed = _pass_filters(parts, rules.review.filters, Counter())
    rows = polars.scan_parquet(list(parts), hive_partitioning=False)
    return choose(rows.join(passed.lazy(), on="line", how="semi"), rules.review)


def _publish_review(folder: Path, parts: Sequence[Path], selection: polars.DataFrame) -> None:
    fresh = _make_draft(folder)
    _write_parts(parts, fresh, lambda rows: rows.select(*COLUMNS, *JUDGED).join(selection.lazy(), on="line"))
    _replace(folder, fresh)


def _pass_filters(parts: Sequence[Path], filters: Filters, refused: Counter[str]) -> polars.DataFrame:
    """Return the lines that pass; those that do not are counted by the filter that they break first."""
    passed: list[int] = []
    repeats = _Repeats(filters.duplicates)
    for path in parts:
        rows = (
            polars.scan_parquet(path, hive_partitioning=False)
            .select("line", "prompt", "prompt_hash", "answer", refusal(filters))
            .collect()
        )
        for row in rows.iter_rows(named=True):
            reason = row[REFUSED] or repeats.find(row)
            if reason is None:
                passed.append(row["line"])
            else:
                refused[reason] += 1
    return polars.DataFrame({"line": passed}, schema=_LINE)


class _Repeats:
    """Notices rows that say what an earlier one said."""

    def __init__(self, rule: Duplicates | None) -> None:
        self._of = rule.of if rule else None
        self._near = NearDuplicates(rule.similarity) if rule and rule.similarity < 1 else None
        self._seen: set[bytes] = set()

    def find(self, row: Mapping[str, Any]) -> str | None:
        """Return the reason to leave a row out; otherwise the row counts as kept."""
        if self._of is None:
            return None
        if self._near is not None:
            return f"similar_{self._of}" if self._near.seen(self._text(row)) else None
        key = self._key(row)
        if key in self._seen:
            return f"repeated_{self._of}"
        self._seen.add(key)
        return None

    def _text(self, row: Mapping[str, Any]) -> str:
        return "\n".join(row[name] for name in ("prompt", "answer") if self._of in (name, "both"))

    def _key(self, row: Mapping[str, Any]) -> bytes:
        asked = bytes.fromhex(row["prompt_hash"])
        if self._of == "prompt":
            return asked
        said = row["answer"].encode("utf-8", "surrogatepass")
        return hashlib.blake2b(said if self._of == "answer" else asked + said, digest_size=16).digest()


def _write_parts(
    parts: Sequence[Path], folder: Path, choose_rows: Callable[[polars.LazyFrame], polars.LazyFrame]
) -> None:
    """Write what `choose_rows` leaves of each part, in the order of the lines."""
    number = 0
    for path in parts:
        rows = choose_rows(polars.scan_parquet(path, hive_partitioning=False)).sort("line").collect()
        if len(rows):
            rows.write_parquet(folder / f"part-{number:05d}.parquet", compression="zstd")
            number += 1


def review_rows(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows that a person reviews, one file in memory at a time."""
    for path in sorted(folder.glob("*.parquet")):
        yield from polars.read_parquet(path, hive_partitioning=False).iter_rows(named=True)


def _make_draft(folder: Path, kind: str = "") -> Path:
    fresh = folder.with_name(f"{folder.name}{'.' + kind if kind else ''}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def _replace(folder: Path, fresh: Path) -> None:
    """Put `fresh` in the place of `folder`. Killed in between, the next run finds `.new` and starts again."""
    for path in fresh.iterdir():
        sync_folder(path)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    sync_folder(folder.parent)
