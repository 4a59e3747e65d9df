"""Makes the gold set of all reviews: prompts with the answers that people agreed on. In: the review rows; out: one
version folder with Parquet files. Called by the `gold_set` asset. Which items are gold is in core/gold.py.

A prompt that was reviewed in several batches of a project is one item, with the newest review.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import polars

from vllm_batch_dagster.core.gold import REPEATED, GoldItem, to_gold
from vllm_batch_dagster.core.judging import ReviewRule
from vllm_batch_dagster.stages.review_rows import DATASET as REVIEWED
from vllm_batch_dagster.stages.review_rows import ROWS_PER_PART, ReviewRows, write_rows
from vllm_batch_dagster.stages.training_sets import judgements
from vllm_batch_dagster.stages.versions import Version, write_manifest, write_version

DATASET = "gold"


@dataclass(frozen=True, slots=True)
class GoldRules:
    """How several reviewers are settled, and the least rating of a gold item (0: any, also none)."""

    reviewers: ReviewRule = ReviewRule.LATEST
    min_rating: int = 4


@dataclass(slots=True)
class GoldCounts:
    """`left_out` by reason, `by_verdict` and `by_model` of the `items`."""

    items: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    by_verdict: Counter[str] = field(default_factory=Counter)
    by_model: Counter[str] = field(default_factory=Counter)


def make_gold_set(datasets: Path, rules: GoldRules) -> tuple[Version, GoldCounts]:
    """Write the gold set of the reviews under `datasets`. Raises StorageFailure."""
    return write_version(datasets / DATASET, lambda folder: _write(folder, ReviewRows(datasets / REVIEWED), rules))


def read_gold(folder: Path) -> Iterator[GoldItem]:
    """Yield the items of a version, in the order of their export keys, a part at a time."""
    for part in sorted(folder.glob("gold-*.parquet")):
        yield from (GoldItem(**row) for row in polars.read_parquet(part).iter_rows(named=True))


def _write(folder: Path, rows: ReviewRows, rules: GoldRules) -> GoldCounts:
    # An id and a time for each item: the one thing here that grows with the reviews.
    newest: dict[tuple[str, str], tuple[str, str]] = {}
    for item in _items(rows, rules, Counter()):
        place = item.project_id, item.id
        newest[place] = max(newest.get(place, ("", "")), (item.reviewed_at, item.export_key))
    counts, kept, parts = GoldCounts(), list[GoldItem](), 0
    for item in _items(rows, rules, counts.left_out):
        if newest[item.project_id, item.id] != (item.reviewed_at, item.export_key):
            counts.left_out[REPEATED] += 1
            continue
        kept.append(item)
        counts.items += 1
        counts.by_verdict[item.verdict] += 1
        counts.by_model[item.model] += 1
        if len(kept) >= ROWS_PER_PART:
            parts = _flush(folder, parts, kept)
    _flush(folder, parts, kept)
    rule = {"reviewers_rule": rules.reviewers.value, "min_rating": rules.min_rating}
    write_manifest(folder, {**rule, **msgspec.to_builtins(counts)})
    return counts


def _items(rows: ReviewRows, rules: GoldRules, left_out: Counter[str]) -> Iterator[GoldItem]:
    for judged in judgements(rows, rules.reviewers, left_out):
        item = to_gold(judged, rules.min_rating)
        if isinstance(item, str):
            left_out[item] += 1
        else:
            yield item


def _flush(folder: Path, part: int, rows: list[GoldItem]) -> int:
    if not rows:
        return part
    write_rows(folder / f"gold-{part:05d}.parquet", rows)
    rows.clear()
    return part + 1
