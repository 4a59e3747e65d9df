"""Makes training sets of all reviews: one version folder with sft.jsonl, dpo.jsonl, kto.jsonl and the judged answers as
Parquet. In: the review rows; called by the `training_dataset` asset. What a line looks like is in core/training.py.

Reviews stream through in the order of their export keys, so the same reviews make the same bytes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec

from vllm_batch_dagster.core.judging import Judgement, ReviewRule, judge
from vllm_batch_dagster.core.reviewed import Review
from vllm_batch_dagster.core.training import CONVERSIONS, FORMATS, expected_answer
from vllm_batch_dagster.stages.review_rows import DATASET as REVIEWED
from vllm_batch_dagster.stages.review_rows import ROWS_PER_PART, ReviewRows, write_rows
from vllm_batch_dagster.stages.versions import Version, write_manifest, write_version

DATASET = "training"


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """One judged answer and where it comes from; `messages` and `request` are JSON, `expected` empty when there is no
    answer that the person wants. `sft_lines` and so on: how many lines of each file it gave."""

    export_key: str
    batch_id: str
    custom_id: str
    project_id: str
    line: int
    endpoint: str
    model: str
    request: str
    messages: str
    prompt: str
    answers: Sequence[str]
    expected: str
    verdict: str
    rating: int
    issues: Sequence[str]
    preference: int
    annotator: str
    reviewers: int
    agreeing: int
    reviewed_at: str
    lead_seconds: float
    sft_lines: int
    dpo_lines: int
    kto_lines: int


@dataclass(slots=True)
class SetCounts:
    """`items` are reviewed answers, `unsettled` those without a judgement, by reason; `lines` by file; `dropped`:
    judged answers that gave no line of a file, by file and reason."""

    items: int = 0
    judged: int = 0
    unsettled: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=lambda: {each: Counter() for each in FORMATS})


def make_training_set(datasets: Path, rule: ReviewRule) -> tuple[Version, SetCounts]:
    """Write the sets of the reviews under `datasets`. Raises StorageFailure."""
    return write_version(datasets / DATASET, lambda folder: _write(folder, ReviewRows(datasets / REVIEWED), rule))


def judgements(rows: ReviewRows, rule: ReviewRule, unsettled: Counter[str]) -> Iterator[Judgement]:
    """Yield what the reviews of each line come to; lines without a judgement are counted by reason."""
    for versions in rows.histories():
        judged = judge(versions, rule)
        if isinstance(judged, str):
            unsettled[judged] += 1
        else:
            yield judged


def _write(folder: Path, rows: ReviewRows, rule: ReviewRule) -> SetCounts:
    counts = SetCounts()
    with ExitStack() as stack:
        files = {each: stack.enter_context((folder / f"{each}.jsonl").open("wb")) for each in FORMATS}
        kept: list[JudgedRow] = []
        parts = 0
        for judged in judgements(rows, rule, counts.unsettled):
            kept.append(_row(judged.review, judged, _write_lines(judged, files, counts)))
            counts.judged += 1
            if len(kept) >= ROWS_PER_PART:
                parts = _flush(folder, parts, kept)
        _flush(folder, parts, kept)
    counts.items = counts.judged + counts.unsettled.total()
    write_manifest(folder, {"reviewers_rule": rule.value, **msgspec.to_builtins(counts)})
    return counts


def _write_lines(judged: Judgement, files: Mapping[str, BinaryIO], counts: SetCounts) -> dict[str, int]:
    written = {}
    for name, convert in CONVERSIONS.items():
        lines, reason = convert(judged)
        for line in lines:
            files[name].write(msgspec.json.encode(line) + b"\n")
        counts.lines[name] += len(lines)
        if not lines:
            counts.dropped[name][reason] += 1
        written[f"{name}_lines"] = len(lines)
    return written


def _row(review: Review, judged: Judgement, written: dict[str, int]) -> JudgedRow:
    return JudgedRow(
        export_key=review.export_key,
        batch_id=review.batch_id,
        custom_id=review.custom_id,
        project_id=review.project_id,
        line=review.line,
        endpoint=review.endpoint,
        model=review.model,
        request=review.request,
        messages=review.messages,
        prompt=review.prompt,
        answers=review.answers,
        expected=expected_answer(review) or "",
        verdict=review.verdict,
        rating=review.rating,
        issues=review.issues,
        preference=review.preference,
        annotator=review.annotator,
        reviewers=judged.votes,
        agreeing=judged.agreeing,
        reviewed_at=review.updated_at,
        lead_seconds=review.lead_seconds,
        **written,
    )


def _flush(folder: Path, part: int, rows: list[JudgedRow]) -> int:
    """Write what has come together as the next part. Returns the number of parts."""
    if not rows:
        return part
    write_rows(folder / f"judged-{part:05d}.parquet", rows)
    rows.clear()
    return part + 1
