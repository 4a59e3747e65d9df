"""A project of reviews in memory, for tests of the way back: what LabelStudioAnnotations says, without a server."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tests.unit.review_samples import SOURCE, at
from vllm_batch_dagster.core.errors import ReviewFailed
from vllm_batch_dagster.core.reviewed import AnnotatedTask


class Project:
    """See AnnotationSource. `fails_after` that many pages the server is gone."""

    def __init__(self, page: int = 2, source: str = SOURCE) -> None:
        self.tasks: dict[int, AnnotatedTask] = {}
        self.asked: list[str | None] = []
        self.fails_after: int | None = None
        self._page, self._source = page, source

    def put(self, *tasks: AnnotatedTask) -> None:
        self.tasks |= {task.id: task for task in tasks}

    def withdraw(self, number: int, minute: int) -> None:
        """Delete the annotations of a task; the export then says nothing of it."""
        self.tasks[number] = replace(self.tasks[number], data={}, annotations=(), updated_at=at(minute))

    @property
    def id(self) -> str:
        return self._source

    @property
    def url(self) -> str:
        return "http://label-studio.test/projects/1"

    def newest(self) -> str | None:
        return max((task.updated_at for task in self.tasks.values()), default=None)

    def changed(self, since: str | None) -> Iterator[Sequence[AnnotatedTask]]:
        self.asked.append(since)
        found = [task for _id, task in sorted(self.tasks.items()) if since is None or task.updated_at >= since]
        for number, start in enumerate(range(0, len(found), self._page)):
            if number == self.fails_after:
                raise ReviewFailed("the server is gone")
            yield found[start : start + self._page]
