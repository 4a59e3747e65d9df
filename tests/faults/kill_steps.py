"""What the processes of test_kill_points.py do, in a module that a fresh process can import."""

import os
import traceback
from pathlib import Path

import dagster as dg

from tests.defs.graph import Graph, every_id, line_of
from tests.faults.invariants import journalled
from vllm_batch_dagster.core.ports import EngineRequest
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.failpoints import VARIABLE

LINES = 8
_UNFINISHED = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.NOT_STARTED]


class Steps:
    """What the processes do, on one folder. `witness` has the lines that the engine was asked, in order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.witness, self._batch = folder / "witness", folder / "batch"
        self.history = folder / "history"
        self.history.mkdir(exist_ok=True)

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


def do_step(folder: Path, name: str, points: Path, words: Path) -> None:
    """Do `drive` or `go_on` with the failpoints armed, and end this process; what it raises is in `words`."""
    os.environ[VARIABLE] = str(points)
    code = 1
    try:
        getattr(Steps(folder), name)()
        code = 0
    except BaseException:  # noqa: BLE001 - the process must end here, whatever it is
        words.write_text(traceback.format_exc())
    finally:
        os._exit(code)
