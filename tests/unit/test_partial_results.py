"""A reader of partial results gets each line once, whatever attempts do meanwhile and wherever it resumes."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from tests.unit.conftest import Rig, WatchedEngine, answer, id_range, ids
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.states import BatchEvent
from vllm_batch_dagster.stages import partial
from vllm_batch_dagster.stages.attempts import ChunkAttempt
from vllm_batch_dagster.stages.partial import PartialResults

Row = dict[str, Any]


def open_reader(rig: Rig, batch_id: str, after: str = "", *, with_errors: bool = False) -> PartialResults:
    ports = (rig.store, rig.files, rig.workspace)
    return PartialResults(rig.batch(batch_id), *ports, after=after, with_errors=with_errors)


def take(reader: PartialResults) -> list[Row]:
    """Everything that there is for now."""
    rows: list[Row] = []
    while block := reader.next_block():
        rows += [msgspec.json.decode(line) for line in block.splitlines()]
    return rows


def look(reader: PartialResults) -> list[Row]:
    reader.refresh()
    return take(reader)


def answer_some(attempt: ChunkAttempt, numbers: Sequence[int], *, ok: bool = True) -> None:
    """Answer lines of the batch, in this order."""
    pending = {line.line: line for line in attempt.pending_lines()}
    for number in numbers:
        answer(pending[number], ok=ok)
    attempt.mirror_progress()


def test_lines_come_as_they_are_journalled_and_each_once(rig: Rig) -> None:
    batch_id = rig.start(10)
    reader = open_reader(rig, batch_id)
    assert look(reader) == []
    first, second = rig.begin(batch_id, 0), rig.begin(batch_id, 1)
    answer_some(first, [3, 0])
    assert ids(look(reader)) == ["id-3", "id-0"]
    answer_some(second, [6])
    answer_some(first, [1])
    assert ids(look(reader)) == ["id-1", "id-6"]
    assert look(reader) == []
    assert take(reader) == []


def test_the_rows_are_those_of_the_output_file(rig: Rig) -> None:
    batch_id = rig.start(1)
    attempt = rig.begin(batch_id)
    answer_some(attempt, [0])
    (row,) = look(open_reader(rig, batch_id))
    attempt.publish()
    attempt.close()
    rig.merge(batch_id)
    assert [row] == rig.output(batch_id)


def test_failed_lines_come_only_when_they_are_asked_for(rig: Rig) -> None:
    batch_id = rig.start(5)
    attempt = rig.begin(batch_id)
    answer_some(attempt, [0], ok=False)
    answer_some(attempt, [1])
    assert ids(look(open_reader(rig, batch_id))) == ["id-1"]
    both = look(open_reader(rig, batch_id, with_errors=True))
    assert [(row["custom_id"], row["response"]["status_code"]) for row in both] == [("id-0", 400), ("id-1", 200)]


def test_a_cursor_resumes_at_any_line(rig: Rig) -> None:
    batch_id = rig.start(10)
    answer_some(rig.begin(batch_id, 0), [4, 2, 0])
    answer_some(rig.begin(batch_id, 1), [9, 5, 7])
    whole = ids(look(open_reader(rig, batch_id)))
    assert len(whole) == 6

    cursor, resumed = "", []
    for _ in range(10):
        reader = open_reader(rig, batch_id, cursor)
        reader.refresh()
        line = next(reader._sweep, None)
        if line is None:
            break
        resumed.append(msgspec.json.decode(line)["custom_id"])
        cursor = str(reader.cursor)
    assert resumed == whole


def test_a_second_attempt_doubles_nothing_and_loses_nothing(rig: Rig) -> None:
    batch_id = rig.start(5)
    live = open_reader(rig, batch_id)
    stale = rig.begin(batch_id)
    late = list(stale.pending_lines())
    answer_some(stale, [0])
    assert ids(look(live)) == ["id-0"]
    early = str(live.cursor)
    newer = rig.begin(batch_id)
    answer(late[3])  # the old attempt does not know yet
    answer_some(newer, [3, 1])
    assert ids(look(live)) == ["id-3", "id-1"]
    middle = str(live.cursor)
    answer(late[4])
    answer_some(newer, [4])
    assert ids(look(live)) == ["id-4"]
    for cursor, expected in (("", 4), (early, 3), (middle, 1), (str(live.cursor), 0)):
        assert len(look(open_reader(rig, batch_id, cursor))) == expected


def test_a_line_that_a_stale_attempt_writes_late_is_given_by_who_resumes(rig: Rig) -> None:
    batch_id = rig.start(5)
    stale = rig.begin(batch_id)
    late = list(stale.pending_lines())
    answer_some(stale, [0])
    newer = rig.begin(batch_id)
    answer_some(newer, [1])
    reader = open_reader(rig, batch_id)
    assert ids(look(reader)) == ["id-0", "id-1"]
    cursor = str(reader.cursor)
    answer(late[2])
    assert ids(look(open_reader(rig, batch_id, cursor))) == ["id-2"]


def test_a_chunk_that_is_run_again_is_not_told_twice(rig: Rig) -> None:
    batch_id = rig.start(5)
    attempt = rig.begin(batch_id)
    answer_some(attempt, [0, 1])
    live = open_reader(rig, batch_id)
    assert ids(look(live)) == ["id-0", "id-1"]
    cursor = str(live.cursor)
    again = rig.begin(batch_id, fresh=True)
    answer_some(again, [0, 1, 2, 3, 4])
    assert ids(look(live)) == ["id-2", "id-3", "id-4"]
    assert ids(look(open_reader(rig, batch_id, cursor))) == ["id-2", "id-3", "id-4"]
    newcomer = look(open_reader(rig, batch_id))
    assert ids(newcomer) == id_range(5)
    assert all(row["response"]["body"] == {"epoch": 2} for row in newcomer)
    assert str(live.cursor) == "v1_0-0"


async def test_a_chunk_given_whole_is_closed_and_stays_so(rig: Rig) -> None:
    batch_id = rig.start(10)
    await rig.infer(batch_id, WatchedEngine(), only=[0])
    reader = open_reader(rig, batch_id)
    assert sorted(ids(look(reader))) == sorted(id_range(5))
    assert str(reader.cursor) == "v1_0-0"
    await rig.infer(batch_id, WatchedEngine(), only=[0], fresh=[0])
    assert look(reader) == []
    assert look(open_reader(rig, batch_id, "v1_0-0")) == []


async def test_a_frozen_reader_gives_what_its_cursor_says(rig: Rig) -> None:
    batch_id = rig.start(15)
    await rig.infer(batch_id, WatchedEngine(), only=[0])
    attempt = rig.begin(batch_id, 1)
    answer_some(attempt, [5, 6])
    reader = open_reader(rig, batch_id)
    cursor = str(reader.freeze())
    assert cursor.startswith("v1_0-0_1.1:")
    answer_some(attempt, [7])  # after the look: not part of it
    given = ids(take(reader))
    assert sorted(given) == sorted([*id_range(5), "id-5", "id-6"])
    follower = open_reader(rig, batch_id, cursor)
    cursor = str(follower.freeze())
    assert ids(take(follower)) == ["id-7"]
    assert take(follower) == []
    assert str(open_reader(rig, batch_id, cursor).freeze()) == cursor


async def test_a_batch_that_ends_with_gaps_names_them_once(rig: Rig) -> None:
    batch_id = rig.start(10)
    await rig.infer(batch_id, WatchedEngine(), only=[0])
    attempt = rig.begin(batch_id, 1)
    answer_some(attempt, [5])
    live = open_reader(rig, batch_id, with_errors=True)
    assert len(look(live)) == 6
    attempt.close()
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    rig.merge(batch_id)
    assert live.refresh()
    rest = take(live)
    assert ids(rest) == id_range(6, 10)
    assert {row["error"]["code"] for row in rest} == {"batch_cancelled"}
    assert str(live.cursor) == "v1_0-1"
    whole = open_reader(rig, batch_id, with_errors=True)
    assert str(whole.freeze()) == "v1_0-1"
    assert sorted(ids(take(whole))) == sorted(id_range(10))
    assert ids(look(open_reader(rig, batch_id, "v1_0-0"))) == ["id-5"]


def test_between_gaps_there_is_no_cursor(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "BLOCK_BYTES", 1)
    batch_id = rig.start(5)
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    rig.merge(batch_id)
    reader = open_reader(rig, batch_id, with_errors=True)
    reader.refresh()
    assert reader.next_block()
    assert reader.cursor is None
    assert len(take(reader)) == 4
    assert str(reader.cursor) == "v1_0-0"


def test_a_torn_end_is_read_when_it_is_whole(rig: Rig) -> None:
    batch_id = rig.start(5)
    attempt = rig.begin(batch_id)
    answer_some(attempt, [0, 1])
    path = rig.workspace.journal_path(batch_id, 0, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    live = open_reader(rig, batch_id)
    frozen = open_reader(rig, batch_id)
    cursor = frozen.freeze()
    assert ids(look(live)) == ids(take(frozen)) == ["id-0"]
    path.write_bytes(whole)
    assert ids(look(open_reader(rig, batch_id, str(cursor)))) == ["id-1"]
    assert ids(look(open_reader(rig, batch_id, str(live.cursor)))) == ["id-1"]


def test_an_idle_look_reads_no_journal(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = rig.start(5)
    answer_some(rig.begin(batch_id), [0])
    reader = open_reader(rig, batch_id)
    assert len(look(reader)) == 1
    asked: list[str] = []
    monkeypatch.setattr(rig.store.chunks, "list", asked.append)
    assert look(reader) == []
    assert asked == []


@pytest.mark.parametrize(
    "cursor", ["v1_0-7", "v1_9.1:1", "v1_0.1:3", "v1_0.1:999999", "v1_0.9:0", "v1_0.0:0", "nonsense"]
)
def test_a_cursor_of_something_else_is_refused(rig: Rig, cursor: str) -> None:
    batch_id = rig.start(5)
    answer_some(rig.begin(batch_id), [0, 1])
    with pytest.raises(InvalidInput):
        open_reader(rig, batch_id, cursor)
