"""Reviews come back once, whatever is pulled again, cut off or changed in between."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import polars
import pytest

from tests.unit.conftest import Rig
from tests.unit.review_samples import annotation, at, task
from tests.unit.review_source import Project
from vllm_batch_dagster.core.errors import ReviewFailed
from vllm_batch_dagster.core.judging import ReviewRule
from vllm_batch_dagster.core.reviewed import Review
from vllm_batch_dagster.stages import review_rows
from vllm_batch_dagster.stages.pulling import PullPorts, is_behind, pull_reviews
from vllm_batch_dagster.stages.review_counts import count_reviews
from vllm_batch_dagster.stages.review_rows import ReviewRows


@pytest.fixture
def ports(rig: Rig, tmp_path: Path) -> PullPorts:
    return PullPorts(rig.store, rig.files, rig.workspace, tmp_path / "datasets" / "reviewed", nullcontext)


def kept(ports: PullPorts) -> Sequence[Review]:
    return [each for versions in ReviewRows(ports.folder).histories() for each in versions]


def test_the_same_again_adds_nothing(ports: PullPorts) -> None:
    project = Project()
    project.put(*(task(number, annotation(number, verdict="accept")) for number in range(5)))
    first = pull_reviews(project, ports)
    assert (first.new.total(), first.tasks, first.since) == (5, 5, None)
    assert first.path is not None
    for everything in (False, True):
        again = pull_reviews(project, ports, everything=everything)
        assert (again.new.total(), again.path) == (0, None)
    assert [each.custom_id for each in kept(ports)] == [f"id-{number}" for number in range(5)]


def test_only_what_changed_is_looked_at(ports: PullPorts) -> None:
    """With a while more than since the newest change that was there when the last pull began."""
    project = Project()
    assert not is_behind(project, ports.folder)
    project.put(task(1, annotation(1, verdict="accept"), minute=5), task(2, annotation(2, verdict="accept"), minute=30))
    assert is_behind(project, ports.folder)
    pull_reviews(project, ports)
    assert not is_behind(project, ports.folder)
    project.put(task(3, annotation(3, verdict="edit"), minute=31))
    assert is_behind(project, ports.folder)
    report = pull_reviews(project, ports)
    assert project.asked == [None, at(20)]
    assert (report.tasks, dict(report.new)) == (2, {"finished": 1})


def test_tasks_that_nobody_has_annotated_are_no_news_twice(ports: PullPorts) -> None:
    project = Project()
    project.put(task(1))
    assert pull_reviews(project, ports).path is None
    assert not is_behind(project, ports.folder)


def test_a_changed_annotation_is_a_new_version(ports: PullPorts) -> None:
    project = Project()
    project.put(task(1, annotation(1, minute=1, verdict="accept")))
    pull_reviews(project, ports)
    project.put(task(1, annotation(1, minute=40, verdict="reject"), minute=40))
    assert pull_reviews(project, ports).new.total() == 1
    assert [each.verdict for each in kept(ports)] == ["accept", "reject"]


def test_a_deleted_annotation_is_noted_once(ports: PullPorts) -> None:
    project = Project()
    project.put(task(1, annotation(1, verdict="accept")))
    pull_reviews(project, ports)
    project.withdraw(1, minute=40)
    assert dict(pull_reviews(project, ports).new) == {"withdrawn": 1}
    assert pull_reviews(project, ports).new.total() == 0
    counts = count_reviews(ReviewRows(ports.folder), ReviewRule.LATEST)
    assert (counts.annotations, counts.items, dict(counts.by_verdict)) == (0, 1, {"withdrawn": 1})


def test_a_pull_that_fails_shows_nothing_and_loses_nothing(ports: PullPorts) -> None:
    project = Project(page=2)
    project.put(*(task(number, annotation(number, verdict="accept"), minute=number) for number in range(5)))
    project.fails_after = 1
    with pytest.raises(ReviewFailed):
        pull_reviews(project, ports)
    assert kept(ports) == []
    project.fails_after = None
    assert pull_reviews(project, ports).new.total() == 5
    assert not list(ports.folder.glob("*.new"))


def test_skipped_foreign_and_unreadable_ones(ports: PullPorts) -> None:
    project = Project()
    broken = {**annotation(3), "updated_at": "yesterday"}
    foreign = task(4, annotation(4, verdict="accept"), export_key=None)
    project.put(task(1, annotation(1, skipped=True)), task(3, broken), foreign)
    report = pull_reviews(project, ports)
    assert (dict(report.new), report.foreign, report.unreadable) == ({"skipped": 1}, 1, 1)


def test_the_request_comes_along(ports: PullPorts, rig: Rig) -> None:
    batch_id = rig.start(3)
    project = Project()
    project.put(
        *(task(number, annotation(number, verdict="accept"), batch=batch_id) for number in (0, 2)),
        task(7, annotation(7, verdict="accept"), batch=batch_id),
        task(8, annotation(8, verdict="accept"), batch="batch_gone"),
    )
    pull_reviews(project, ports)
    found = {each.custom_id: each for each in kept(ports)}
    assert {name: (each.line, each.endpoint) for name, each in found.items()} == {
        "id-0": (0, "/v1/chat/completions"),
        "id-2": (2, "/v1/chat/completions"),
        "id-7": (-1, "/v1/chat/completions"),
        "id-8": (-1, ""),
    }
    assert '"model":"tiny"' in found["id-2"].request.replace(" ", "")
    assert [each.project_id for each in found.values()] == ["default"] * 3 + [""]


def test_two_projects_of_the_same_ids(ports: PullPorts) -> None:
    for source in ("project-1-a", "project-1-b"):
        project = Project(source=source)
        project.put(task(1, annotation(1, verdict="accept")))
        assert pull_reviews(project, ports).new.total() == 1
    assert len(kept(ports)) == 2


def test_histories_come_a_few_at_a_time(ports: PullPorts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review_rows, "KEYS_AT_ONCE", 3)
    monkeypatch.setattr(review_rows, "ROWS_PER_PART", 2)
    project = Project(page=4)
    project.put(*(task(number, annotation(number, verdict="accept")) for number in range(10)))
    path = pull_reviews(project, ports).path
    assert path is not None
    assert len(list(path.glob("*.parquet"))) == 5
    assert [len(each) for each in ReviewRows(ports.folder).histories()] == [1] * 10
    assert polars.scan_parquet(path / "*.parquet").collect().height == 10
