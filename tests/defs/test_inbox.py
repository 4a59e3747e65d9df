"""The drop folder in the graph: what the sensor asks for, what the run shows, and the way of a file through both."""

import os
from pathlib import Path
from typing import cast

import dagster as dg
import pytest

from tests.defs.graph import Graph, chat_lines
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.defs.inbox import INGEST_JOB, build_inbox


class InboxGraph(Graph):
    """The graph with its inbox."""

    job, sensor = build_inbox()

    @property
    def folder(self) -> Path:
        return self.services.settings.inbox_path

    def look(self) -> dg.RunRequest | dg.SkipReason:
        context = dg.build_sensor_context(instance=self.instance, resources={"services": self.services})
        return cast(dg.RunRequest | dg.SkipReason, self.sensor(context))

    def drop(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.write_bytes(content)
        os.utime(path, (1.0, 1.0))

    def ingest(self) -> dg.ExecuteInProcessResult:
        return self.job.execute_in_process(
            instance=self.instance, resources={"services": self.services}, raise_on_error=False
        )


@pytest.fixture
def inbox(tmp_path: Path, instance: dg.DagsterInstance) -> InboxGraph:
    graph = InboxGraph(tmp_path, instance)
    graph.look()
    return graph


def shown(result: dg.ExecuteInProcessResult) -> dict[str, object]:
    (event,) = [event for event in result.all_events if event.is_successful_output or event.is_step_failure]
    found = event.step_output_data.metadata if event.is_successful_output else {}
    return {name: value.value for name, value in found.items()}


def test_the_sensor_makes_the_folders_and_asks_for_nothing(inbox: InboxGraph) -> None:
    assert {path.name for path in inbox.folder.iterdir() if path.is_dir()} == {".taken", "done", "rejected"}
    assert inbox.look() == dg.SkipReason("the inbox: nothing to do")


def test_the_way_of_a_dropped_file(inbox: InboxGraph) -> None:
    inbox.drop("questions.jsonl", b"\n".join(chat_lines(4)) + b"\n")
    assert isinstance(inbox.look(), dg.RunRequest)
    result = inbox.ingest()
    (batch,) = inbox.services.store.batches.open()
    assert result.success
    assert shown(result) == {"batches created": 1, "batches created: names": [batch.id]}
    assert inbox.look() == dg.SkipReason("the inbox: nothing to do"), "it is not judged yet"
    inbox.finish(batch.id)
    assert inbox.look() == dg.SkipReason("the inbox: 1 done")
    (report,) = inbox.folder.glob("done/*/report.md")
    assert batch.id in report.read_text()


def test_one_run_at_a_time(inbox: InboxGraph) -> None:
    inbox.drop("a.jsonl", b"\n".join(chat_lines(1)) + b"\n")
    inbox.instance.create_run_for_job(inbox.job, status=dg.DagsterRunStatus.STARTED)
    assert inbox.look() == dg.SkipReason("files were dropped; a run is about to take them")


def test_what_cannot_be_stored_fails_the_run_and_is_tried_again(
    inbox: InboxGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox.drop("a.jsonl", b"\n".join(chat_lines(1)) + b"\n")

    def refuse(*_args: object, **_options: object) -> str:
        raise StorageFailure("no space")

    with monkeypatch.context() as patch:
        patch.setattr(inbox.services.store.files, "add", refuse)
        result = inbox.ingest()
        assert not result.success
    assert isinstance(inbox.look(), dg.RunRequest)
    assert inbox.ingest().success
    assert len(inbox.services.store.batches.open()) == 1


def test_the_job_has_a_name_that_the_sensor_asks_for(inbox: InboxGraph) -> None:
    assert inbox.job.name == INGEST_JOB
