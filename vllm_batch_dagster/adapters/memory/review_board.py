"""The twin of a Label Studio project: as forgetful as the real one, which knows no uniqueness."""

from collections.abc import Callable, Mapping, Sequence

from vllm_batch_dagster.core.review import KnownTask, ReviewTask

# Called with the name of each call, before and after it is carried out; it may raise ReviewFailed.
Fault = Callable[[str, bool], None]


def no_fault(call: str, is_done: bool) -> None:
    """Nothing goes wrong."""


class MemoryBoard:
    """See ReviewBoard. `tasks` holds what is there."""

    def __init__(self, fault: Fault = no_fault) -> None:
        self.tasks: list[tuple[KnownTask, ReviewTask]] = []
        self._fault, self._next = fault, 1

    @property
    def url(self) -> str:
        return "memory:"

    def find(self, keys: Sequence[str]) -> Mapping[str, Sequence[KnownTask]]:
        self._fault("find", False)
        found: dict[str, list[KnownTask]] = {}
        for known, _task in self.tasks:
            if known.key in keys:
                found.setdefault(known.key, []).append(known)
        return found

    def add(self, tasks: Sequence[ReviewTask]) -> None:
        self._fault("add", False)
        self.put(tasks)
        self._fault("add", True)

    def put(self, tasks: Sequence[ReviewTask], *, is_touched: bool = False) -> None:
        """Add without a fault: what somebody else does."""
        for task in tasks:
            self.tasks.append((KnownTask(self._next, task.key, task.answer_hash, is_touched), task))
            self._next += 1

    def remove(self, task: KnownTask) -> None:
        self._fault("remove", False)
        self.tasks = [each for each in self.tasks if each[0].id != task.id]
        self._fault("remove", True)

    def count(self, batch_id: str) -> int:
        self._fault("count", False)
        return sum(task.data["batch_id"] == batch_id for _known, task in self.tasks)
