"""Writes reviewer corrections as what a next batch needs: examples, or an input file. In: the review rows; out: lines.

Called by `vllm-batch reviews export`. The forms are in core/few_shot.py.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from vllm_batch_dagster.core.few_shot import Example, ask_again, to_example
from vllm_batch_dagster.core.judging import Judgement, ReviewRule
from vllm_batch_dagster.stages.review_rows import DATASET as REVIEWED
from vllm_batch_dagster.stages.review_rows import ReviewRows
from vllm_batch_dagster.stages.training_sets import judgements

OTHER_VERDICT, OTHER_ENDPOINT = "other_verdict", "other_endpoint"


@dataclass(slots=True)
class ExportCounts:
    """`left_out` by reason. `endpoint` is that of the written requests: a batch has one."""

    written: int = 0
    endpoint: str = ""
    left_out: Counter[str] = field(default_factory=Counter)


def choose_examples(datasets: Path, rule: ReviewRule, most: int, counts: ExportCounts) -> Sequence[Example]:
    """Return the best examples, the best one first; only `most` are held. Equal prompts give one."""
    best: list[tuple[tuple[int, int, str], str, Example]] = []
    for judged in judgements(ReviewRows(datasets / REVIEWED), rule, counts.left_out):
        example = to_example(judged)
        if isinstance(example, str):
            counts.left_out[example] += 1
        elif most and not _is_shown(example, best):
            heapq.heappush(best, (example.rank, example.export_key, example))
            if len(best) > most:
                heapq.heappop(best)
    return [example for _rank, _key, example in sorted(best, reverse=True)]


def _is_shown(example: Example, best: Sequence[tuple[tuple[int, int, str], str, Example]]) -> bool:
    return any(each.messages[0] == example.messages[0] and each.rank >= example.rank for _rank, _key, each in best)


def example_lines(examples: Sequence[Example], counts: ExportCounts) -> Iterator[bytes]:
    """Yield the lines of an examples file: {"messages": [user, assistant], "export_key"}."""
    for each in examples:
        counts.written += 1
        yield msgspec.json.encode({"messages": each.messages, "export_key": each.export_key}) + b"\n"


def next_batch_lines(
    datasets: Path,
    rule: ReviewRule,
    verdicts: Collection[str],
    examples: Sequence[Example],
    model: str,
    counts: ExportCounts,
) -> Iterator[bytes]:
    """Yield the lines of a batch file that asks the prompts with these verdicts again. The first one says the
    endpoint."""
    for judged in judgements(ReviewRows(datasets / REVIEWED), rule, counts.left_out):
        line = _next_line(judged, verdicts, examples, model, counts)
        if isinstance(line, str):
            counts.left_out[line] += 1
        else:
            counts.written += 1
            yield line


def _next_line(
    judged: Judgement, verdicts: Collection[str], examples: Sequence[Example], model: str, counts: ExportCounts
) -> bytes | str:
    if judged.review.verdict not in verdicts:
        return OTHER_VERDICT
    line = ask_again(judged, examples, model)
    if isinstance(line, str):
        return line
    endpoint = msgspec.json.decode(line)["url"]
    counts.endpoint = counts.endpoint or endpoint
    return line if endpoint == counts.endpoint else OTHER_ENDPOINT
