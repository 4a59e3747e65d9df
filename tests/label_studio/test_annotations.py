"""The way back from a real Label Studio: what has changed is found, said and withdrawn exactly once."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.label_studio.rows import tasks
from tests.unit.conftest import Rig
from tests.unit.review_samples import said
from vllm_batch_dagster.adapters.label_studio import LabelStudioBoard, LabelStudioSession
from vllm_batch_dagster.adapters.label_studio.annotations import LabelStudioAnnotations, open_annotations
from vllm_batch_dagster.core.judging import ReviewRule
from vllm_batch_dagster.core.reviewed import Review
from vllm_batch_dagster.stages.gold_sets import GoldRules, make_gold_set
from vllm_batch_dagster.stages.pulling import PullPorts, PullReport, is_behind, pull_reviews
from vllm_batch_dagster.stages.review_rows import ReviewRows
from vllm_batch_dagster.stages.training_sets import make_training_set


class Way:
    """One project and the reviews that come back from it. `say` annotates a task as its page does."""

    def __init__(self, board: LabelStudioBoard, session: LabelStudioSession, rig: Rig) -> None:
        self._board, self._session = board, session
        self.source = LabelStudioAnnotations(session, board.project_id, page_tasks=3)
        self.datasets = rig.folder / "datasets"
        self._ports = PullPorts(rig.store, rig.files, rig.workspace, self.datasets / "reviewed", nullcontext)

    def add(self, count: int, **changes: Any) -> Sequence[int]:
        """Add tasks. Returns their ids in order."""
        made = tasks(count, **changes)
        self._board.add(made)
        found = self._board.find([task.key for task in made])
        return [found[task.key][0].id for task in made]

    def say(self, task_id: int, **answers: Any) -> int:
        body = {"result": said(**answers), "lead_time": 2.5}
        return int(self._session.post(f"/api/tasks/{task_id}/annotations/", body)["id"])

    def skip(self, task_id: int) -> None:
        self._session.post(f"/api/tasks/{task_id}/annotations/", {"result": [], "was_cancelled": True})

    def change(self, annotation_id: int, **answers: Any) -> None:
        self._session.patch(f"/api/annotations/{annotation_id}/", {"result": said(**answers)})

    def withdraw(self, annotation_id: int) -> None:
        self._session.delete(f"/api/annotations/{annotation_id}/")

    def pull(self, *, everything: bool = False) -> PullReport:
        return pull_reviews(self.source, self._ports, everything=everything)

    def is_behind(self) -> bool:
        return is_behind(self.source, self._ports.folder)

    def kept(self) -> Sequence[Review]:
        return [each for versions in ReviewRows(self._ports.folder).histories() for each in versions]


@pytest.fixture
def way(board: LabelStudioBoard, session: LabelStudioSession, tmp_path: Path) -> Way:
    return Way(board, session, Rig(tmp_path))


def test_everything_that_people_said_comes_back_once(way: Way) -> None:
    ids = way.add(8, answers=("a", "b"))
    assert way.is_behind(), "there are tasks"
    for number in range(4):
        way.say(ids[number], verdict="accept", rating=5, issues=["format"])
    way.say(ids[4], verdict="edit", rating=4, correction="better", preference="B")
    way.skip(ids[5])
    report = way.pull()
    assert (dict(report.new), report.foreign, report.unreadable) == ({"finished": 5, "skipped": 1}, 0, 0)
    kept = {each.custom_id: each for each in way.kept()}
    assert set(kept) == {f"id-{number}" for number in range(6)}
    edited = kept["id-4"]
    assert (edited.verdict, edited.rating, edited.correction, edited.preference) == ("edit", 4, "better", 1)
    assert (edited.answers, edited.model, edited.annotator, edited.lead_seconds) == (["a", "b"], "tiny", "1", 2.5)
    assert kept["id-5"].state == "skipped"
    assert not way.is_behind()
    assert way.pull().new.total() == way.pull(everything=True).new.total() == 0


def test_changes_and_withdrawals_come_back_as_versions(way: Way) -> None:
    ids = way.add(3)
    changed, withdrawn = way.say(ids[0], verdict="accept", rating=5), way.say(ids[1], verdict="accept", rating=5)
    way.pull()
    way.change(changed, verdict="edit", rating=4, correction="better")
    way.withdraw(withdrawn)
    assert way.is_behind()
    assert dict(way.pull().new) == {"finished": 1, "withdrawn": 1}
    assert [(each.custom_id, each.verdict, each.state) for each in way.kept()] == [
        ("id-0", "accept", "finished"),
        ("id-0", "edit", "finished"),
        ("id-1", "accept", "finished"),
        ("id-1", "accept", "withdrawn"),
    ]
    assert way.pull().new.total() == 0
    _, counts = make_training_set(way.datasets, ReviewRule.LATEST)
    assert (dict(counts.lines), dict(counts.unsettled)) == ({"sft": 1, "dpo": 1, "kto": 2}, {"withdrawn": 1})
    assert make_gold_set(way.datasets, GoldRules())[1].items == 1


def test_each_task_comes_once_in_pages(way: Way) -> None:
    """Also tasks without annotations, of which the server's export knows nothing."""
    ids = way.add(8)
    way.say(ids[6], verdict="accept")
    pages = list(way.source.changed(None))
    assert [len(page) for page in pages] == [3, 3, 2]
    assert [task.id for page in pages for task in page] == list(ids)
    newest = way.source.newest()
    assert newest is not None
    assert [task.id for page in way.source.changed(newest) for task in page] == [ids[6]]


def test_our_projects_are_found(session: LabelStudioSession, board: LabelStudioBoard) -> None:
    (chosen,) = open_annotations(session, board.project_id)
    assert chosen.url == board.url
    assert chosen.id == open_annotations(session, board.project_id)[0].id
    names = ("vLLM batches", "vLLM batches: team", "vLLM batches of others")
    made = {name: session.post("/api/projects/", {"title": name})["id"] for name in names}
    found = [source.url.rpartition("/")[2] for source in open_annotations(session, 0)]
    assert found == [str(made[name]) for name in names[:2]]
