"""Takes the selected rows of a batch to the people who review them, each exactly once. Called by `curated_export`.

The server has no uniqueness, and an error never means "not added". So for each group of tasks: look up which are there,
add the others, and after any error wait and look up again. A reply that was lost together with a late commit, or two
exporters at once, can still double a task; the next look at its key removes the copy that nobody has touched. So the
state converges however often this runs, and a lock is only there to save work (see composition.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from vllm_batch_dagster.core.errors import ReviewFailed
from vllm_batch_dagster.core.review import KnownTask, ReviewTask
from vllm_batch_dagster.core.review_ports import ReviewBoard

GROUP_TASKS = 100
GROUP_BYTES = 4 << 20
PAUSES = (1.0, 3.0, 10.0, 30.0)

Wait = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class PushReport:
    """Tasks of one push. `known` were there before; `renewed` of the added ones replace one with an older answer that
    nobody had worked on; `outdated` have an older answer that somebody has, and stay; `copies` were removed; `failures`
    of calls were survived. `in_project` is the server's count of the batch's tasks at the end, `expected` ours.
    """

    url: str = ""
    added: int = 0
    renewed: int = 0
    known: int = 0
    outdated: int = 0
    copies: int = 0
    failures: int = 0
    in_project: int = 0
    expected: int = 0

    @property
    def is_whole(self) -> bool:
        return self.in_project == self.expected


def push_tasks(batch_id: str, tasks: Iterable[ReviewTask], board: ReviewBoard, wait: Wait) -> PushReport:
    """Bring all `tasks` of a batch onto the board. Raises ReviewFailed when that stays impossible; the next push finds
    what is there by then."""
    total = PushReport(url=board.url, expected=board.count(batch_id))
    for tasks_ in _groups(tasks):
        group = _Group(tasks_, board)
        group.push(wait)
        total = group.add_to(total)
    return replace(total, in_project=board.count(batch_id))


def _groups(tasks: Iterable[ReviewTask]) -> Iterator[Sequence[ReviewTask]]:
    """Yield groups bounded in number, because keys travel in a URL, and in bytes."""
    group: list[ReviewTask] = []
    size = 0
    for task in tasks:
        group.append(task)
        size += len(msgspec.json.encode(task.data))
        if len(group) >= GROUP_TASKS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


class _Group:
    """Up to 100 tasks on their way."""

    def __init__(self, tasks: Sequence[ReviewTask], board: ReviewBoard) -> None:
        self._wanted, self._board = {task.key: task for task in tasks}, board
        self._there: Mapping[str, Sequence[KnownTask]] | None = None  # at the first look
        self._renewed: set[str] = set()
        self._outdated: set[str] = set()
        self._copies, self._failures = 0, 0

    def push(self, wait: Wait) -> None:
        """Look and add until all are there. After a failure it is a look that says so, never the answer to an `add`:
        the call that failed may be carried out later than we look."""
        pauses = iter(PAUSES)
        while True:
            try:
                if self._look_and_add():
                    return
            except ReviewFailed as failure:
                self._failures += 1
                pause = next(pauses, None)
                if pause is None or not failure.may_pass:
                    raise
                wait(pause)

    def _look_and_add(self) -> bool:
        """Return whether nothing remains to be looked at."""
        found = self._board.find(list(self._wanted))
        if self._there is None:
            self._there = found
        missing = [task for key, task in self._wanted.items() if not self._tidy(task, found.get(key, ()))]
        if not missing:
            return True
        self._board.add(missing)
        return self._failures == 0

    def _tidy(self, task: ReviewTask, found: Sequence[KnownTask]) -> bool:
        """Remove what must not be there. Returns whether the task is."""
        touched = [each for each in found if each.is_touched]
        fresh = [each for each in found if not each.is_touched and each.answer_hash == task.answer_hash]
        stay = touched or fresh[:1]
        for each in found:
            if each not in stay:
                self._board.remove(each)
        if touched and all(each.answer_hash != task.answer_hash for each in touched):
            self._outdated.add(task.key)
        if found and not stay:
            self._renewed.add(task.key)
        self._copies += max(0, len(found) - max(1, len(stay)))
        return bool(stay)

    def add_to(self, total: PushReport) -> PushReport:
        """Return `total` with this group in it."""
        there = self._there or {}
        new = len(self._wanted) - len(there)
        copies = sum(len(found) - max(1, sum(each.is_touched for each in found)) for found in there.values())
        return replace(
            total,
            added=total.added + new + len(self._renewed),
            renewed=total.renewed + len(self._renewed),
            known=total.known + len(there),
            outdated=total.outdated + len(self._outdated),
            copies=total.copies + self._copies,
            failures=total.failures + self._failures,
            expected=total.expected + new - copies,
        )
