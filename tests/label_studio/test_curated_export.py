"""The whole way out: a finished batch, its selection, and tasks in a real Label Studio."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from scripts.label_studio import EMAIL, LabelStudio
from tests.defs.curating import ask_schedule
from tests.defs.graph import Graph, checks, values
from tests.faults.proxy import FaultProxy
from vllm_batch_dagster.adapters.label_studio import LabelStudioBoard, LabelStudioSession, open_board, title_of
from vllm_batch_dagster.cli.checkup import Finding
from vllm_batch_dagster.cli.curation_checkup import check_curation
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages import pushing

IMPORT = b"POST /api/projects"


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    home = tmp_path / "dagster"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        yield instance


@pytest.fixture
def proxy(label_studio: LabelStudio) -> Iterator[FaultProxy]:
    proxy = FaultProxy(label_studio.port)
    yield proxy
    proxy.close()


def graph_of(folder: Path, instance: dg.DagsterInstance, url: str, key: str, project: int) -> Graph:
    return Graph(folder, instance, label_studio_url=url, label_studio_api_key=key, label_studio_project_id=project)


def shown(graph: Graph, batch_id: str) -> dict[str, Any]:
    return values(graph.shown("curated_export", batch_id)[0].metadata)


def test_a_batch_becomes_tasks_through_a_lost_reply_and_again(
    tmp_path: Path,
    instance: dg.DagsterInstance,
    proxy: FaultProxy,
    board: LabelStudioBoard,
    personal_token: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(pushing, "PAUSES", (0.1,) * 4)
    graph = graph_of(tmp_path, instance, proxy.url, personal_token, board.project_id)
    proxy.drop_replies(1, IMPORT)
    batch_id = graph.merged(8)
    metadata = shown(graph, batch_id)
    assert (metadata["tasks_added"], metadata["failures_survived"], metadata["tasks_in_project"]) == (8, 1, 8)
    assert metadata["label_studio"] == f"{proxy.url}/projects/{board.project_id}"
    result = graph.run("curate_batch", batch_id)
    assert checks(result)["tasks_pushed", batch_id]
    metadata = shown(graph, batch_id)
    assert (metadata["tasks_added"], metadata["tasks_known"], metadata["tasks_in_project"]) == (0, 8, 8)
    assert ask_schedule(graph) == "every selection has reached Label Studio"
    told = [str(event) for run in instance.get_runs() for event in instance.all_logs(run.run_id)]
    assert len(told) > 20
    assert personal_token not in "".join(told) + caplog.text + str(metadata)
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if personal_token.encode() in path.read_bytes()]


def test_what_could_not_be_pushed_is_pushed_by_the_schedule(
    tmp_path: Path,
    instance: dg.DagsterInstance,
    proxy: FaultProxy,
    label_studio: LabelStudio,
    board: LabelStudioBoard,
) -> None:
    graph = graph_of(tmp_path, instance, proxy.url, label_studio.token, board.project_id)
    proxy.cut()
    batch_id = graph.inferred(5)
    result = graph.run("finalize_batch", batch_id)
    assert result.success
    assert not checks(result)["tasks_pushed", batch_id]
    assert graph.batch(batch_id).status.value == "completed"
    proxy.mend()
    assert ask_schedule(graph) == [batch_id]
    assert graph.run("curate_batch", batch_id).success
    assert board.count(batch_id) == 5
    assert ask_schedule(graph) == "every selection has reached Label Studio"


def test_without_a_number_each_api_project_gets_its_own(
    tmp_path: Path, instance: dg.DagsterInstance, label_studio: LabelStudio, session: LabelStudioSession
) -> None:
    graph = graph_of(tmp_path, instance, label_studio.url, label_studio.token, 0)
    ours, theirs = graph.merged(2), graph.merged(3, project_id="proj-blue")
    assert open_board(session, 0, title_of("default")).count(ours) == 2
    assert open_board(session, 0, title_of("proj-blue")).count(theirs) == 3
    assert open_board(session, 0, title_of("default")).count(theirs) == 0


def test_a_wrong_key_is_a_warning_that_does_not_show_it(
    tmp_path: Path, instance: dg.DagsterInstance, label_studio: LabelStudio
) -> None:
    key = "f" * 39 + "0"
    graph = graph_of(tmp_path, instance, label_studio.url, key, 0)
    batch_id = graph.merged(2)
    metadata = shown(graph, batch_id)
    assert metadata["label_studio"].startswith("failed: Label Studio answered 401")
    told = [str(event) for run in instance.get_runs() for event in instance.all_logs(run.run_id)]
    assert key not in "".join(told)


def test_the_doctor_says_whose_key_it_is(label_studio: LabelStudio, personal_token: str) -> None:
    settings = Settings(label_studio_url=label_studio.url, label_studio_api_key=personal_token)
    assert list(check_curation(settings))[1] == Finding("Label Studio", "ok", f"{label_studio.url} as {EMAIL}")
