"""The push of tasks into a real Label Studio: each line one task, whatever happens on the way."""

from collections.abc import Iterator, Sequence

import pytest

from scripts.label_studio import LabelStudio
from tests.faults.proxy import FaultProxy
from tests.label_studio.rows import row, tasks
from vllm_batch_dagster.adapters.label_studio import LabelStudioBoard, LabelStudioSession, open_board
from vllm_batch_dagster.adapters.label_studio.interface import INTERFACE
from vllm_batch_dagster.core.errors import ReviewFailed
from vllm_batch_dagster.core.review import ReviewTask, make_task
from vllm_batch_dagster.stages.pushing import PushReport, push_tasks

IMPORT = b"POST /api/projects"


def no_wait(seconds: float) -> None:
    assert seconds > 0


@pytest.fixture
def proxy(label_studio: LabelStudio) -> Iterator[FaultProxy]:
    proxy = FaultProxy(label_studio.port)
    yield proxy
    proxy.close()


def copies(board: LabelStudioBoard, pushed: Sequence[ReviewTask]) -> list[int]:
    """How many tasks each line has."""
    found: dict[str, int] = {}
    for start in range(0, len(pushed), 100):
        keys = [task.key for task in pushed[start : start + 100]]
        found |= {key: len(known) for key, known in board.find(keys).items()}
    return [found.get(task.key, 0) for task in pushed]


def test_a_rerun_doubles_nothing(board: LabelStudioBoard) -> None:
    wanted = tasks(250)
    first = push_tasks("batch_1", wanted, board, no_wait)
    assert first == PushReport(url=board.url, added=250, in_project=250, expected=250)
    second = push_tasks("batch_1", wanted, board, no_wait)
    assert second == PushReport(url=board.url, known=250, in_project=250, expected=250)
    assert copies(board, wanted) == [1] * 250


def test_replies_that_are_lost_after_the_commit(
    proxy: FaultProxy, label_studio: LabelStudio, board: LabelStudioBoard
) -> None:
    wanted = tasks(220)
    proxy.drop_replies(2, IMPORT)
    with LabelStudioSession(proxy.url, label_studio.token) as session:
        report = push_tasks("batch_1", wanted, open_board(session, board.project_id, ""), no_wait)
    assert proxy.drops_left == 0
    assert (report.added, report.failures, report.in_project, report.expected) == (220, 2, 220, 220)
    assert copies(board, wanted) == [1] * 220


def test_a_server_that_stays_away_fails_the_push_and_the_next_one_finishes_it(
    proxy: FaultProxy, label_studio: LabelStudio, board: LabelStudioBoard
) -> None:
    wanted = tasks(120)
    seen: list[float] = []
    with LabelStudioSession(proxy.url, label_studio.token) as session:
        through = open_board(session, board.project_id, "")

        def cut_after_the_first_group() -> Iterator[ReviewTask]:
            yield from wanted[:100]
            yield from wanted[100:110]
            proxy.cut()
            yield from wanted[110:]

        with pytest.raises(ReviewFailed):
            push_tasks("batch_1", cut_after_the_first_group(), through, seen.append)
    assert len(seen) == 4
    assert board.count("batch_1") == 100
    report = push_tasks("batch_1", wanted, board, no_wait)
    assert (report.added, report.known, report.in_project) == (20, 100, 120)
    assert copies(board, wanted) == [1] * 120


def test_copies_that_two_pushers_made_are_removed_but_no_work_of_a_person(
    session: LabelStudioSession, board: LabelStudioBoard
) -> None:
    wanted = tasks(3)
    for _ in range(3):
        board.add(wanted)
    worked_on = [board.find([wanted[0].key])[wanted[0].key][at].id for at in (1, 2)]
    for task in worked_on:
        session.post(f"/api/tasks/{task}/annotations/", {"result": []})
    report = push_tasks("batch_1", wanted, board, no_wait)
    assert report.copies == 5
    assert report.is_whole
    assert copies(board, wanted) == [2, 1, 1]
    assert [task.id for task in board.find([wanted[0].key])[wanted[0].key]] == worked_on


def test_a_line_that_was_answered_anew(session: LabelStudioSession, board: LabelStudioBoard) -> None:
    """The task follows the answer, unless somebody has worked on it."""
    push_tasks("batch_1", tasks(3), board, no_wait)
    reviewed = board.find(["batch_1/id-0"])["batch_1/id-0"][0].id
    session.post(f"/api/tasks/{reviewed}/annotations/", {"was_cancelled": True, "result": []})
    again = tasks(3, answers=("better",))
    report = push_tasks("batch_1", again, board, no_wait)
    assert (report.added, report.renewed, report.outdated, report.in_project) == (2, 2, 1, 3)
    assert report.is_whole
    assert [board.find([task.key])[task.key][0].answer_hash == task.answer_hash for task in again] == [
        False,
        True,
        True,
    ]


def test_what_a_task_holds(session: LabelStudioSession, board: LabelStudioBoard) -> None:
    task = make_task(
        row(1, answers=("one", "two"), is_cut=True, mean_logprob=-0.5, score=-0.5, rules=["low", "random"])
    )
    push_tasks("batch_1", [task], board, no_wait)
    stored = session.get(f"/api/tasks/{board.find([task.key])[task.key][0].id}/")
    assert stored["data"] == task.data
    assert stored["data"]["why"] == "low (score -0.5), random"
    (prediction,) = stored["predictions"]
    assert prediction["model_version"] == "tiny"
    assert prediction["score"] == pytest.approx(0.6065)
    assert {each["from_name"]: each["value"] for each in prediction["result"]} == {
        "correction": {"text": ["one"]},
        "issues": {"choices": ["incomplete"]},
    }


def test_a_project_of_somebody_else_gets_only_the_predictions_that_it_can_show(
    session: LabelStudioSession, title: str
) -> None:
    theirs = '<View><Text name="answer" value="$answer"/><Choices name="issues" toName="answer">' + (
        '<Choice value="format"/></Choices></View>'
    )
    project = session.post("/api/projects/", {"title": title, "label_config": theirs})["id"]
    board = open_board(session, project, "")
    push_tasks("batch_1", [make_task(row(1, is_cut=True)), make_task(row(2, breaks_schema=True))], board, no_wait)
    assert session.get(f"/api/projects/{project}/")["label_config"] == theirs
    results = [
        [
            result["from_name"]
            for each in session.get(f"/api/tasks/{known[0].id}/")["predictions"]
            for result in each["result"]
        ]
        for known in board.find(["batch_1/id-1", "batch_1/id-2"]).values()
    ]
    assert results == [[], ["issues"]]


def test_a_project_without_an_interface_gets_ours(session: LabelStudioSession, title: str) -> None:
    project = session.post("/api/projects/", {"title": title})["id"]
    open_board(session, project, "")
    assert session.get(f"/api/projects/{project}/")["label_config"] == INTERFACE


def test_a_project_is_found_by_its_whole_title(session: LabelStudioSession, title: str) -> None:
    longer = open_board(session, 0, f"{title} and more")
    exact = open_board(session, 0, title)
    assert exact.project_id != longer.project_id
    assert open_board(session, 0, title).project_id == exact.project_id


def test_an_interface_that_asks_for_other_data_is_an_error_without_the_prompt(
    session: LabelStudioSession, title: str
) -> None:
    theirs = '<View><Text name="x" value="$picture"/><TextArea name="t" toName="x"/></View>'
    project = session.post("/api/projects/", {"title": title, "label_config": theirs})["id"]
    with pytest.raises(ReviewFailed, match="picture") as failure:
        push_tasks("batch_1", tasks(1), open_board(session, project, ""), no_wait)
    assert not failure.value.may_pass
    assert "question" not in str(failure.value)


def test_a_project_that_is_not_there(session: LabelStudioSession) -> None:
    with pytest.raises(ReviewFailed, match="404"):
        open_board(session, 999_999, "")
