"""Replay of journals with repair rounds: attempt and result agree on the accepted answer, whatever the deaths left."""

import random
import tempfile
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.conftest import Rig
from vllm_batch_dagster.core.journal import (
    FAILED_REPAIR,
    LENGTH_FLAW,
    REPAIRED,
    SCHEMA_FLAW,
    JournalRecord,
    encode_record,
)
from vllm_batch_dagster.core.journal import UNREPAIRED as FLAWED
from vllm_batch_dagster.core.models import Usage
from vllm_batch_dagster.core.results import SUCCEEDED, read_results
from vllm_batch_dagster.stages.journals import JournalReader

LINES = 6


def record(line: int, round_: int, repair: str, mark: int, *, ok: bool = True) -> JournalRecord:
    body = b'{"mark":%d,"usage":{"prompt_tokens":%d,"completion_tokens":1}}' % (mark, 10 + round_)
    return JournalRecord(line, f"id-{line}", ok, 200 if ok else 400, "r", 0.1, 1, msgspec.Raw(body), round_, repair)


@st.composite
def histories(draw: st.DrawFn) -> list[list[JournalRecord]]:
    """Journals of up to three attempts. A line has some rounds, then an accepted answer; of what is repeated after it,
    and of copies, nothing may count."""
    epochs: list[list[JournalRecord]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for line in range(LINES):
        rounds = draw(st.integers(0, 5))
        flaws = [draw(st.sampled_from((LENGTH_FLAW, SCHEMA_FLAW))) for _ in range(rounds)]
        steps = [record(line, number, flaw, number) for number, flaw in enumerate(flaws)]
        if rounds and draw(st.booleans()):
            steps += [record(line, rounds, FAILED_REPAIR, 90, ok=False), record(line, rounds - 1, FLAWED, rounds - 1)]
        else:
            steps.append(record(line, rounds, REPAIRED if rounds else "", rounds))
        steps += [record(line, rounds, REPAIRED, 77) for _ in range(draw(st.integers(0, 1)))]
        epoch = 0
        for step in steps:
            epoch = draw(st.integers(epoch, len(epochs) - 1))
            epochs[epoch].append(step)
    return epochs


def accepted(epochs: list[list[JournalRecord]]) -> dict[int, JournalRecord]:
    first: dict[int, JournalRecord] = {}
    for journal in epochs:
        for each in journal:
            if each.repair not in (LENGTH_FLAW, SCHEMA_FLAW, FAILED_REPAIR):
                first.setdefault(each.line, each)
    return first


def counted(epochs: list[list[JournalRecord]]) -> set[tuple[int, int]]:
    """The (line, round) of each success up to the accepted one: what a stale run has added is nobody's."""
    asked, ended = set(), set()
    for each in (each for journal in epochs for each in journal):
        if each.line not in ended and each.ok:
            asked.add((each.line, each.round))
        if each.repair not in (LENGTH_FLAW, SCHEMA_FLAW, FAILED_REPAIR):
            ended.add(each.line)
    return asked


@given(histories(), st.integers(0, 1 << 16))
@settings(max_examples=60)
def test_the_first_accepted_answer_wins_and_tokens_count_once(epochs: list[list[JournalRecord]], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder))
        batch_id = rig.start(LINES, chunk_size=LINES)
        chance = random.Random(seed)
        for number, journal in enumerate(epochs, start=1):
            rig.store.chunks.begin(batch_id, 0, fresh=False, run_id="r", now=0)
            mixed = shuffled(journal, chance)
            rig.workspace.journal_path(batch_id, 0, number).write_bytes(b"".join(map(encode_record, mixed)))
        attempt = rig.begin(batch_id)
        assert attempt.is_durable
        assert list(attempt.pending_lines()) == []
        summary = attempt.publish()
        attempt.close()
        wanted = accepted(epochs)
        with rig.workspace.result_path(batch_id, 0, attempt.epoch).open("rb") as packed:
            entries = read_results(packed).entries
        with JournalReader(rig.workspace, batch_id, 0) as reader:
            assert [reader.read(entry) for entry in entries] == [wanted[line] for line in range(LINES)]
        assert {entry.outcome for entry in entries} == {SUCCEEDED}
        asked = counted(epochs)
        assert summary.usage == Usage(
            input_tokens=sum(10 + round_ for _line, round_ in asked), output_tokens=len(asked)
        )
        assert summary.repairs.repaired == sum(each.repair == REPAIRED for each in wanted.values())
        assert summary.repairs.unrepaired == sum(each.repair == FLAWED for each in wanted.values())


def shuffled(journal: list[JournalRecord], chance: random.Random) -> list[JournalRecord]:
    """Mix the lines; the records of one line stay in order."""
    left = {line: [each for each in journal if each.line == line] for line in range(LINES)}
    mixed: list[JournalRecord] = []
    while any(left.values()):
        mixed.append(left[chance.choice([line for line, rest in left.items() if rest])].pop(0))
    return mixed
