"""Asks a model the gold prompts again, as an ordinary batch, and later compares its answers with those of the people.

`start_regression` is called by the job `regression_batch`, `report_regression` by the asset `regression_report` when
the batch has ended. A note in `regression/<batch_id>/started.json` is written before the batch is made, so that the
sensor finds every one; `report.json` beside it says that the report is made, and of which merge.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import msgspec

from vllm_batch_dagster.core.agreement import NO_ANSWER, Spread, compare
from vllm_batch_dagster.core.creation import FileFacts, Randomness, new_batch_id, new_file_id
from vllm_batch_dagster.core.curation import read_text
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.gold import REGRESSION_OF, GoldItem, request_line
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore
from vllm_batch_dagster.stages.gold_sets import DATASET as GOLD
from vllm_batch_dagster.stages.gold_sets import read_gold
from vllm_batch_dagster.stages.intake import create_batch, receive_file
from vllm_batch_dagster.stages.publication import make_folder, publish
from vllm_batch_dagster.stages.review_rows import ROWS_PER_PART, write_rows
from vllm_batch_dagster.stages.versions import latest_version, version_id, version_path

DATASET = "regression"
WORST = 5

Part: TypeAlias = tuple[str, str]
_STARTED, _REPORT = "started.json", "report.json"


class Started(msgspec.Struct, frozen=True):
    """A regression: its batch, the version of the gold set, how many prompts, and the model, empty: of each prompt."""

    batch_id: str
    gold: str
    items: int
    model: str


@dataclass(frozen=True, slots=True)
class RegressionPorts:
    """`datasets` is the folder of all data sets."""

    store: BatchStore
    files: FileStore
    clock: Clock
    datasets: Path


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One gold prompt in a regression; `custom_id` is that of the line that was reviewed, `before` the token_f1 of its
    answer."""

    id: str
    export_key: str
    custom_id: str
    model: str
    answer: str
    expected: str
    exact: float
    token_f1: float
    chrf: float
    before: float


@dataclass(slots=True)
class RegressionReport:
    """`unanswered` prompts have no answer with text and count 0. `worst` are those with the lowest token_f1."""

    started: Started
    merged_version: int
    exact: int = 0
    unanswered: int = 0
    token_f1: Spread = field(default_factory=Spread)
    chrf: Spread = field(default_factory=Spread)
    before: Spread = field(default_factory=Spread)
    worst: list[ScoreRow] = field(default_factory=list)
    path: Path = Path()

    @property
    def agreement(self) -> float:
        return self.token_f1.mean

    def add(self, row: ScoreRow) -> None:
        self.exact += row.exact == 1.0
        self.unanswered += not row.answer
        self.token_f1.add(row.token_f1)
        self.chrf.add(row.chrf)
        self.before.add(row.before)
        self.worst = sorted([*self.worst, row], key=lambda each: each.token_f1)[:WORST]


def start_regression(ports: RegressionPorts, randomness: Callable[[str], Randomness], model: str) -> list[Started]:
    """Make a batch of the latest gold set for each project and endpoint that its prompts have, and return them; none of
    an empty set. A batch belongs to the project whose prompts it asks. `randomness` gives the ids from a role: done
    again with the same, nothing is doubled. Raises NotFound without a gold set."""
    folder = latest_version(ports.datasets / GOLD)
    if folder is None:
        raise NotFound("gold set: materialize `gold_set` first; no version", "latest")
    parts = sorted({(item.project_id, item.endpoint) for item in read_gold(folder)})
    return [_start(folder, part, ports, randomness, model) for part in parts]


def _start(
    folder: Path, part: Part, ports: RegressionPorts, randomness: Callable[[str], Randomness], model: str
) -> Started:
    batch_id = new_batch_id(randomness(f"batch:{part}"))
    items = sum(1 for _ in _asked(folder, part))
    started = Started(batch_id, version_id(folder), items, model)
    place = make_folder(ports.datasets / DATASET / batch_id)
    with publish(place / _STARTED) as file:
        file.write(msgspec.json.encode(started))
    if _find(batch_id, ports.store) is None:
        file_id = _store_file(folder, part, ports, randomness(f"file:{part}"), model)
        # Prompts of several models may stand in a file, and one whose model is gone must not stop the others.
        metadata = {REGRESSION_OF: started.gold, "name": "regression", "validation": "lenient"}
        params = {
            "input_file_id": file_id,
            "endpoint": part[1],
            "completion_window": "24h",
            "metadata": metadata,
        }
        create_batch(params, ports.store, ports.clock, randomness(f"batch:{part}"), project_id=part[0])
    return started


def _store_file(folder: Path, part: Part, ports: RegressionPorts, randomness: Randomness, model: str) -> str:
    file_id = new_file_id(randomness)
    try:
        return ports.store.files.get(file_id).id
    except NotFound:
        pass
    lines = (request_line(item.id, item.endpoint, item.request, model) for item in _asked(folder, part))
    facts = FileFacts(f"regression-{version_id(folder)}.jsonl", "batch", project_id=part[0])
    file = receive_file(lines, facts, store=ports.store, files=ports.files, clock=ports.clock, randomness=randomness)
    return file.id


def _asked(folder: Path, part: Part) -> Iterator[GoldItem]:
    """Yield the items of one project and endpoint, in the order of the batch's file."""
    return (item for item in read_gold(folder) if (item.project_id, item.endpoint) == part)


def due_reports(datasets: Path, store: BatchStore) -> Iterator[Batch]:
    """Yield the batches of regressions that have ended and have no report, or one of an older merge."""
    for place in sorted((datasets / DATASET).glob("batch_*")):
        batch = _find(place.name, store)
        is_ended = batch is not None and batch.is_terminal and not batch.is_stale
        if batch is not None and is_ended and _reported(place) != batch.merged_version:
            yield batch


def newest_regression(datasets: Path, store: BatchStore) -> Batch:
    """Return the newest batch of a regression that has ended. Raises NotFound."""
    found = [_find(place.name, store) for place in (datasets / DATASET).glob("batch_*")]
    ended = [batch for batch in found if batch is not None and batch.is_terminal]
    if not ended:
        raise NotFound("regression that has ended: run the job `regression_batch`; no batch", "latest")
    return max(ended, key=attrgetter("created_at"))


def report_regression(batch: Batch, ports: RegressionPorts) -> RegressionReport:
    """Compare the answers of an ended batch with the gold set that it asked; write all scores as Parquet. Raises
    NotFound for a batch that is no regression or whose gold set is gone, StateConflict for an open one."""
    place = ports.datasets / DATASET / batch.id
    started = _read_started(place)
    if not batch.is_terminal:
        raise StateConflict(f"{batch.id} is {batch.status.value}: its report is made when it has ended")
    folder = version_path(ports.datasets / GOLD, started.gold)
    if not folder.is_dir():
        raise NotFound("version of the gold set", started.gold)
    report = RegressionReport(started, batch.merged_version, path=place)
    for part, rows in _parts(_score(folder, batch, ports)):
        for row in rows:
            report.add(row)
        write_rows(place / f"scores-{part:05d}.parquet", rows)
    _note(place, report)
    return report


def _parts(rows: Iterator[ScoreRow]) -> Iterator[tuple[int, list[ScoreRow]]]:
    numbered = ((number // ROWS_PER_PART, row) for number, row in enumerate(rows))
    for part, group in groupby(numbered, key=lambda pair: pair[0]):
        yield part, [row for _part, row in group]


def _score(folder: Path, batch: Batch, ports: RegressionPorts) -> Iterator[ScoreRow]:
    """Walk through the prompts and the output file side by side: both are in the order of the batch's input."""
    answers = _answers(batch, ports.files)
    custom_id, answer = next(answers, ("", ""))
    for item in _asked(folder, (batch.project_id, batch.endpoint)):
        if custom_id == item.id:
            yield _row(item, answer)
            custom_id, answer = next(answers, ("", ""))
        else:
            yield _row(item, "")


def _answers(batch: Batch, files: FileStore) -> Iterator[tuple[str, str]]:
    """Yield custom_id and text of the answered lines."""
    if batch.output_file_id is None:
        return
    with files.open(batch.output_file_id) as output:
        for line in _lines(output):
            said = msgspec.json.decode(line, type=dict[str, Any])
            yield str(said["custom_id"]), read_text(said["response"]["body"])


def _lines(file: BinaryIO) -> Iterator[bytes]:
    return (line for line in file if not line.isspace())


def _row(item: GoldItem, answer: str) -> ScoreRow:
    scores = compare(answer, item.expected) if answer.strip() else NO_ANSWER
    return ScoreRow(
        id=item.id,
        export_key=item.export_key,
        custom_id=item.custom_id,
        model=item.model,
        answer=answer,
        expected=item.expected,
        exact=scores.exact,
        token_f1=scores.token_f1,
        chrf=scores.chrf,
        before=compare(item.answer, item.expected).token_f1,
    )


def _note(place: Path, report: RegressionReport) -> None:
    said = {
        "merged_version": report.merged_version,
        "items": report.token_f1.count,
        "unanswered": report.unanswered,
        "agreement": report.agreement,
        "chrf": report.chrf.mean,
        "agreement_before": report.before.mean,
    }
    with publish(place / _REPORT) as file:
        file.write(msgspec.json.encode(said))


def _reported(place: Path) -> int | None:
    try:
        return int(msgspec.json.decode((place / _REPORT).read_bytes())["merged_version"])
    except FileNotFoundError:
        return None


def _read_started(place: Path) -> Started:
    try:
        return msgspec.json.decode((place / _STARTED).read_bytes(), type=Started)
    except FileNotFoundError:
        raise NotFound("regression", place.name) from None


def _find(batch_id: str, store: BatchStore) -> Batch | None:
    try:
        return store.batches.get(batch_id)
    except NotFound:
        return None
