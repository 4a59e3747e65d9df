"""The push of tasks: whatever fails on the way, each line is one task in the end."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.label_studio.rows import row, tasks
from vllm_batch_dagster.adapters.memory import MemoryBoard
from vllm_batch_dagster.core.errors import ReviewFailed
from vllm_batch_dagster.core.review import make_task
from vllm_batch_dagster.stages import pushing
from vllm_batch_dagster.stages.pushing import PAUSES, push_tasks


def no_wait(seconds: float) -> None:
    """The server is back at once."""


class Faults:
    """Fails the calls whose number is drawn: before they are carried out, or behind it."""

    def __init__(self, numbers: dict[int, bool]) -> None:
        self._numbers, self._call = numbers, 0

    def __call__(self, call: str, is_done: bool) -> None:
        self._call += not is_done
        if self._numbers.get(self._call) is is_done:
            raise ReviewFailed(f"{call} {self._call}")


def keys(board: MemoryBoard) -> Counter[str]:
    return Counter(known.key for known, _task in board.tasks)


@given(st.integers(0, 8), st.dictionaries(st.integers(1, 60), st.booleans(), max_size=25), st.lists(st.integers(0, 7)))
def test_each_line_is_one_task_whatever_fails(count: int, faults: dict[int, bool], before: list[int]) -> None:
    wanted = tasks(count)
    board = MemoryBoard(Faults(faults))
    board.put([make_task(row(number, answers=("old",) if number % 2 else ())) for number in before])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pushing, "GROUP_TASKS", 3)
        for _ in range(60):  # the schedule
            try:
                report = push_tasks("batch_1", wanted, board, no_wait)
            except ReviewFailed:
                continue
            break
    mine = {task.key: task.answer_hash for task in wanted}
    assert {key: number for key, number in keys(board).items() if key in mine} == dict.fromkeys(mine, 1)
    assert {known.key: known.answer_hash for known, _task in board.tasks if known.key in mine} == mine
    assert report.is_whole


def test_a_reply_that_comes_after_the_next_look() -> None:
    """The call that timed out is carried out while we already send the tasks again."""
    wanted = tasks(2)
    late: list[Any] = []

    def fault(call: str, is_done: bool) -> None:
        if call == "add" and not is_done and not late:
            late.append(wanted)
            raise ReviewFailed("timed out")
        if call == "add" and is_done and len(late) == 1:
            late.append(None)
            board.put(wanted)

    board = MemoryBoard(fault)
    report = push_tasks("batch_1", wanted, board, no_wait)
    assert keys(board) == {task.key: 1 for task in wanted}
    assert (report.copies, report.failures, report.is_whole) == (2, 1, True)


def test_it_waits_longer_each_time_and_gives_up() -> None:
    def away(call: str, is_done: bool) -> None:
        if call == "find":
            raise ReviewFailed("away")

    waited: list[float] = []
    with pytest.raises(ReviewFailed, match="away"):
        push_tasks("batch_1", tasks(1), MemoryBoard(away), waited.append)
    assert waited == list(PAUSES)


def test_what_no_repetition_mends_is_not_repeated() -> None:
    def refuse(call: str, is_done: bool) -> None:
        if call == "add":
            raise ReviewFailed("no such field", status=400, may_pass=False)

    waited: list[float] = []
    with pytest.raises(ReviewFailed, match="no such field"):
        push_tasks("batch_1", tasks(1), MemoryBoard(refuse), waited.append)
    assert waited == []


def test_groups_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "GROUP_BYTES", 100_000)
    sizes: list[int] = []

    class Noting(MemoryBoard):
        def add(self, tasks: Any) -> None:
            sizes.append(len(tasks))
            super().add(tasks)

    push_tasks("batch_1", tasks(5, answers=("x" * 60_000,)), Noting(), no_wait)
    assert sizes == [2, 2, 1]


def test_tasks_that_vanish_meanwhile_are_told() -> None:
    class Losing(MemoryBoard):
        def add(self, tasks: Any) -> None:
            super().add(tasks)
            self.tasks.pop()

    report = push_tasks("batch_1", tasks(2), Losing(), no_wait)
    assert (report.in_project, report.expected, report.is_whole) == (1, 2, False)
