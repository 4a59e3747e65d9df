"""A Label Studio project as a ReviewBoard: looks tasks up by their export key, imports and removes them.

Called by stages/pushing.py. The server checks neither that a task is new nor that a prediction fits its interface: the
first is the caller's, the second is done here.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vllm_batch_dagster.adapters.label_studio.interface import INTERFACE, read_controls
from vllm_batch_dagster.adapters.label_studio.session import LabelStudioSession
from vllm_batch_dagster.core.errors import ReviewFailed
from vllm_batch_dagster.core.models import DEFAULT_PROJECT
from vllm_batch_dagster.core.review import Control, KnownTask, ReviewTask, fit_result

# The filter travels in the URL, and the server's own page is slow: it serializes each task.
MOST_KEYS = 100
_FOUND = "id,data,total_annotations,cancelled_annotations,drafts"
_EMPTY = ("", "<View></View>")
_PAGE = 1000
_LONGEST_TITLE = 50


class LabelStudioBoard:
    """See ReviewBoard. `project` is what the server says of it."""

    def __init__(self, session: LabelStudioSession, project: Mapping[str, Any]) -> None:
        self._session, self._id = session, int(project["id"])
        self._controls: Mapping[str, Control] = read_controls(project)

    @property
    def url(self) -> str:
        return f"{self._session.url}/projects/{self._id}"

    @property
    def project_id(self) -> int:
        return self._id

    def find(self, keys: Sequence[str]) -> Mapping[str, Sequence[KnownTask]]:
        if len(keys) > MOST_KEYS:
            raise ValueError(f"at most {MOST_KEYS} keys at once, not {len(keys)}")
        found: dict[str, list[KnownTask]] = {}
        for task in self._list("data.export_key", "in_list", list(keys), page_size=_PAGE, include=_FOUND)["tasks"]:
            known = _known(task)
            found.setdefault(known.key, []).append(known)
        return {key: sorted(tasks, key=lambda task: task.id) for key, tasks in found.items()}

    def add(self, tasks: Sequence[ReviewTask]) -> None:
        body = [self._render(task) for task in tasks]
        said = self._session.post(f"/api/projects/{self._id}/import", body, commit_to_project="true")
        if said.get("task_count") != len(tasks):
            raise ReviewFailed(f"Label Studio took {said.get('task_count')} of {len(tasks)} tasks")

    def remove(self, task: KnownTask) -> None:
        try:
            self._session.delete(f"/api/tasks/{task.id}/")
        except ReviewFailed as failure:
            if failure.status != 404:
                raise

    def count(self, batch_id: str) -> int:
        return int(self._list("data.batch_id", "equal", batch_id, page_size=1, include="id")["total"])

    def _list(self, field: str, operator: str, value: object, *, page_size: int, include: str) -> Any:
        item = {"filter": f"filter:tasks:{field}", "operator": operator, "type": "String", "value": value}
        query = msgspec.json.encode({"filters": {"conjunction": "and", "items": [item]}}).decode()
        return self._session.get(
            "/api/tasks/", project=self._id, query=query, include=include, page_size=page_size, page=1
        )

    def _render(self, task: ReviewTask) -> dict[str, Any]:
        proposed = task.prediction
        result = fit_result(proposed.result, self._controls)
        prediction = {"model_version": proposed.model_version, "score": proposed.score, "result": result}
        return {"data": task.data, "predictions": [prediction] if result else []}


def _known(task: Mapping[str, Any]) -> KnownTask:
    data = task["data"]
    touched = task.get("total_annotations") or task.get("cancelled_annotations") or task.get("drafts")
    return KnownTask(int(task["id"]), str(data["export_key"]), str(data.get("answer_hash", "")), bool(touched))


def title_of(project_id: str) -> str:
    """Return the title of the Label Studio project for an API project. All batches of a project share one: reviewers
    work through a queue, and the column `batch_id` tells them apart."""
    title = "vLLM batches" if project_id == DEFAULT_PROJECT else f"vLLM batches: {project_id}"
    if len(title) <= _LONGEST_TITLE:
        return title
    return f"{title[: _LONGEST_TITLE - 9]} {hashlib.sha256(project_id.encode()).hexdigest()[:8]}"


def open_board(session: LabelStudioSession, project_id: int, title: str) -> LabelStudioBoard:
    """Return the board of a project: of `project_id`, or for 0 of the oldest with exactly this `title`, which is made
    when there is none. A project without a labelling interface gets ours. Raises ReviewFailed."""
    if not project_id:
        return LabelStudioBoard(session, _find_project(session, title) or _create_project(session, title))
    project = session.get(f"/api/projects/{project_id}/")
    if "".join(str(project.get("label_config") or "").split()) in _EMPTY:
        project = session.patch(f"/api/projects/{project_id}/", {"label_config": INTERFACE})
    return LabelStudioBoard(session, project)


def _find_project(session: LabelStudioSession, title: str) -> Mapping[str, Any] | None:
    # The filter of the server looks for a part of the title.
    listed = session.get("/api/projects/", title=title, page_size=_PAGE, include="id,title")["results"]
    ids = [int(project["id"]) for project in listed if project["title"] == title]
    found: Mapping[str, Any] | None = session.get(f"/api/projects/{min(ids)}/") if ids else None
    return found


def _create_project(session: LabelStudioSession, title: str) -> Mapping[str, Any]:
    created: Mapping[str, Any] = session.post(
        "/api/projects/",
        {
            "title": title,
            "description": "Answers that vllm-batch-dagster has selected for review.",
            "label_config": INTERFACE,
            "show_instruction": False,
            "show_collab_predictions": True,
        },
    )
    return created
