"""The process dies exactly at each failpoint of a run, and another one goes on: the real store, files and history, but
each step in a forked process that the test may lose. What a daemon does, marking a dead run as failed, the test does.
"""

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from tests.defs.graph import Graph, every_id, line_of
from tests.faults.invariants import journalled
from tests.faults.matrix import RUN_POINTS
from vllm_batch_dagster.core.ports import EngineRequest
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.failpoints import VARIABLE

LINES = 8
LATER_PASS = {"chunk_start": 2, "mid_chunk": 2, "last_line": 2, "sealed": 2, "published": 3, "merging": 5}
_UNFINISHED = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.NOT_STARTED]


class Steps:
    """What the forked processes do, on one folder. `witness` has the lines that the engine was asked, in order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.witness, self._batch = folder / "witness", folder / "batch"
        self.history = folder / "history"
        self.history.mkdir()

    def open(self, instance: dg.DagsterInstance) -> Graph:
        graph = Graph(self._folder, instance)
        graph.engine.reply = self._bear_witness
        return graph

    def _bear_witness(self, request: EngineRequest) -> None:
        with self.witness.open("a") as file:
            file.write(f"{line_of(request)}\n")

    def drive(self) -> None:
        """Submit a batch and let the sensor drive it; the point ends this process."""
        with dg.DagsterInstance.local_temp(str(self.history)) as instance:
            graph = self.open(instance)
            batch_id = graph.submit(LINES)
            self._batch.write_text(batch_id)
            for _ in range(4):
                graph.step()

    def go_on(self) -> None:
        """As the next processes do after the death of a run."""
        with dg.DagsterInstance.local_temp(str(self.history)) as instance:
            for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
                instance.report_run_failed(run, "its worker is gone")
            graph = self.open(instance)
            batch_id = self._batch.read_text()
            before = self.asked()
            durable = journalled(graph.services.settings.vllm_batch_home, batch_id)
            for _ in range(4):
                assert all(result.success for result in graph.step())
            batch = graph.batch(batch_id)
            assert batch.status is BatchStatus.COMPLETED
            assert (batch.counts.total, batch.counts.completed, batch.counts.failed) == (LINES, LINES, 0)
            assert graph.custom_ids(batch.output_file_id) == every_id(LINES)
            assert durable.isdisjoint(self.asked()[len(before) :]), "an answer on the disk is not asked for again"
            assert all(graph.shown_chunk(batch_id, chunk.index) for chunk in graph.services.store.chunks.list(batch_id))
            assert list(graph.tick().run_requests or ()) == []

    def asked(self) -> list[int]:
        return [int(line) for line in self.witness.read_text().split()] if self.witness.exists() else []


@pytest.mark.parametrize("point", RUN_POINTS)
def test_another_process_goes_on_where_one_died(point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = tmp_path / "failpoints"
    points.mkdir()
    monkeypatch.setenv(VARIABLE, str(points))
    (points / point).write_text(f"kill {LATER_PASS.get(point, 1)}")
    steps = Steps(tmp_path)

    assert in_child(steps.drive, tmp_path / "words") == -signal.SIGKILL, words_of(tmp_path)
    assert (points / f"{point}.hit").exists()
    assert in_child(steps.go_on, tmp_path / "words") == 0, words_of(tmp_path)


def words_of(folder: Path) -> str:
    path = folder / "words"
    return path.read_text() if path.exists() else "it said nothing"


def in_child(work: Callable[[], None], words: Path) -> int:
    """Do it in a forked process and return its exit code; what it raises is in `words`. We open no database ourselves:
    none of ours may be used on both sides of a fork."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the child must end here, whatever it is
            words.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    return wait_for_child(pid)


def wait_for_child(pid: int) -> int:
    end = time.monotonic() + 50
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child did not end")
