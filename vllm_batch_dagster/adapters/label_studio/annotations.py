"""A Label Studio project as an AnnotationSource: which tasks have changed, and what people said about them.

Called by stages/pulling.py. The list of tasks only counts annotations, and the export says all of them but knows only
tasks that have some; so the list finds what changed, and the export of those tasks fills it in.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from vllm_batch_dagster.adapters.label_studio.board import title_of
from vllm_batch_dagster.adapters.label_studio.session import LabelStudioSession
from vllm_batch_dagster.core.models import DEFAULT_PROJECT
from vllm_batch_dagster.core.reviewed import AnnotatedTask, read_time

# Each id travels in the URL.
PAGE_TASKS = 100
_MOST_PROJECTS = 1000
_LISTED = "id,updated_at,total_annotations,cancelled_annotations"


class LabelStudioAnnotations:
    """See AnnotationSource. Pages go by task id, not by number: a task that changes while they are read moves no other
    task out of sight. Raises ReviewFailed when there is no such project."""

    def __init__(self, session: LabelStudioSession, project_id: int, page_tasks: int = PAGE_TASKS) -> None:
        self._session, self._project, self._page = session, project_id, page_tasks
        found = session.get(f"/api/projects/{project_id}/")
        # Ids begin at 1 on every server, and a server can move.
        self._id = f"project-{project_id}-{_compact(str(found['created_at']))}"

    @property
    def id(self) -> str:
        return self._id

    @property
    def url(self) -> str:
        return f"{self._session.url}/projects/{self._project}"

    def newest(self) -> str | None:
        tasks = self._list([], "-tasks:updated_at", 1)
        return read_time(tasks[0]["updated_at"]) if tasks else None

    def changed(self, since: str | None) -> Iterator[Sequence[AnnotatedTask]]:
        after = 0
        later = [_filter("updated_at", "greater_or_equal", since, "Datetime")] if since else []
        while listed := self._list([*later, _filter("id", "greater", after, "Number")], "tasks:id", self._page):
            after = max(int(task["id"]) for task in listed)
            yield list(self._fill(listed))

    def _fill(self, listed: Sequence[Mapping[str, Any]]) -> Iterator[AnnotatedTask]:
        wanted = [int(task["id"]) for task in listed if _has_some(task)]
        exported = {int(task["id"]): task for task in self._export(wanted)} if wanted else {}
        for task in listed:
            # One that lost its last annotation in between is not exported.
            full = exported.get(int(task["id"]), {})
            yield AnnotatedTask(
                int(task["id"]), full.get("data") or {}, full.get("annotations") or (), str(task["updated_at"])
            )

    def _list(self, filters: Sequence[Mapping[str, Any]], order: str, size: int) -> Sequence[Mapping[str, Any]]:
        query = msgspec.json.encode({"filters": {"conjunction": "and", "items": filters}, "ordering": [order]}).decode()
        said = self._session.get(
            "/api/tasks/", project=self._project, query=query, include=_LISTED, page_size=size, page=1
        )
        tasks: Sequence[Mapping[str, Any]] = said["tasks"]
        return tasks

    def _export(self, ids: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        wanted = "&".join(f"ids[]={each}" for each in ids)
        exported: Sequence[Mapping[str, Any]] = self._session.get(
            f"/api/projects/{self._project}/export?exportType=JSON&{wanted}"
        )
        return exported


def open_annotations(session: LabelStudioSession, project_id: int) -> Sequence[LabelStudioAnnotations]:
    """Return the project `project_id`, or for 0 all those that board.py has made, oldest first. Raises ReviewFailed."""
    if project_id:
        return [LabelStudioAnnotations(session, project_id)]
    title = title_of(DEFAULT_PROJECT)
    listed = session.get("/api/projects/", title=title, page_size=_MOST_PROJECTS, include="id,title")["results"]
    ours = (int(each["id"]) for each in listed if each["title"] == title or each["title"].startswith(f"{title}: "))
    return [LabelStudioAnnotations(session, each) for each in sorted(ours)]


def _has_some(task: Mapping[str, Any]) -> bool:
    return bool(task.get("total_annotations") or task.get("cancelled_annotations"))


def _filter(field: str, operator: str, value: object, kind: str) -> Mapping[str, Any]:
    return {"filter": f"filter:tasks:{field}", "operator": operator, "type": kind, "value": value}


def _compact(moment: str) -> str:
    return "".join(letter for letter in moment if letter.isdigit())
