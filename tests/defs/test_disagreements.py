"""Journals, results, materializations and the store disagree, in each pair, whichever is behind: the batch still ends
as if nothing had been, and no line whose answer is on the disk is sent again.

A store that is behind is one that was put back from a backup; a disk that is behind, one that has lost files.
"""

import shutil
import sqlite3
from pathlib import Path

import dagster as dg
import pytest

from tests.defs.graph import SLOTS, Graph, every_id
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.stages.intake import cancel_batch

LINES = 8


@pytest.fixture
def backup(tmp_path: Path, graph: Graph) -> "Backup":
    return Backup(tmp_path, graph)


class Backup:
    """A copy of the batch store that can be put back."""

    def __init__(self, folder: Path, graph: Graph) -> None:
        self._copy = folder / "copy.db"
        self._graph = graph

    def take(self) -> None:
        self._move(self._original, self._copy)

    def put_back(self) -> None:
        self._move(self._copy, self._original)

    @property
    def _original(self) -> Path:
        return self._graph.services.settings.vllm_batch_home / "batches.db"

    def _move(self, source: Path, target: Path) -> None:
        with sqlite3.connect(source) as old, sqlite3.connect(target) as new:
            old.backup(new)


def check_completed(graph: Graph, batch_id: str, lines: int = LINES) -> None:
    batch = graph.finish(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.counts.total, batch.counts.completed, batch.counts.failed) == (lines, lines, 0)
    assert graph.custom_ids(batch.output_file_id) == every_id(lines)
    assert all(graph.shown_chunk(batch_id, chunk.index) for chunk in graph.services.store.chunks.list(batch_id))


def result_files(graph: Graph, batch_id: str) -> list[Path]:
    return sorted((graph.services.settings.batches_folder / batch_id / "results").iterdir())


def test_journals_ahead_of_everything(graph: Graph) -> None:
    """The run died between the last answers and their publication: nothing knows of them but the journals."""
    batch_id = graph.validated()
    graph.engine.break_down(7, when=lambda: graph.has_journal(batch_id, 2))
    assert not graph.run_chunks(batch_id, 2, 2).success
    graph.engine.mend()
    assert graph.engine.lines().count(6) == 1
    check_completed(graph, batch_id)
    assert sorted(graph.engine.lines()) == [0, 1, 2, 3, 4, 5, 7], "line 6 has an answer in the journal"


def test_results_ahead_of_the_graph_that_has_lost_its_storage(graph: Graph, tmp_path: Path) -> None:
    """Dagster's own state is gone: the results are only shown again, and no line is sent."""
    batch_id = graph.inferred()
    with dg.DagsterInstance.ephemeral() as fresh:
        again = Graph(tmp_path, fresh)
        check_completed(again, batch_id)
        assert again.engine.lines() == []


def test_the_graph_ahead_of_a_store_from_before_the_results(graph: Graph, backup: Backup) -> None:
    """The epochs of the store are behind the journals on the disk: theirs must not be used a second time."""
    batch_id = graph.validated()
    backup.take()
    assert graph.run_chunks(batch_id, 0, SLOTS - 1).success
    assert sorted(graph.engine.lines()) == list(range(LINES))
    backup.put_back()
    assert not graph.services.store.chunks.get(batch_id, 0).is_published
    check_completed(graph, batch_id)
    assert graph.engine.lines() == [], "every answer is in a journal"
    assert [chunk.published_epoch for chunk in graph.services.store.chunks.list(batch_id)] == [2, 2, 2]


def test_the_graph_ahead_of_a_store_from_before_the_validation(graph: Graph, backup: Backup) -> None:
    batch_id = graph.admit(LINES)
    backup.take()
    assert graph.run("validate_batch", batch_id).success
    assert graph.run_chunks(batch_id, 0, SLOTS - 1).success
    graph.engine.lines()
    backup.put_back()
    assert graph.batch(batch_id).status is BatchStatus.VALIDATING
    check_completed(graph, batch_id)
    assert graph.engine.lines() == []


def test_the_graph_ahead_of_a_store_from_before_the_merge(graph: Graph, backup: Backup) -> None:
    """The merge is made again, with new files; nothing is left open."""
    batch_id = graph.inferred()
    backup.take()
    first = graph.finish(batch_id)
    backup.put_back()
    check_completed(graph, batch_id)
    assert graph.batch(batch_id).output_file_id != first.output_file_id
    assert graph.engine.lines() == []
    assert list(graph.tick().run_requests or ()) == []


def test_a_repeat_that_the_store_has_forgotten(graph: Graph, backup: Backup) -> None:
    batch_id = graph.inferred()
    backup.take()
    assert graph.run_chunks(batch_id, 1, 1).success
    assert graph.engine.lines() == [3, 4, 5]
    backup.put_back()
    check_completed(graph, batch_id)
    assert graph.engine.lines() == []


def test_the_store_ahead_of_a_result_that_the_disk_has_lost(graph: Graph) -> None:
    """The journals still have the answers."""
    batch_id = graph.inferred()
    result_files(graph, batch_id)[1].unlink()
    (request,) = graph.tick().run_requests or ()
    assert request.job_name == "infer_chunks"
    check_completed(graph, batch_id)
    assert graph.engine.lines() == []


def test_the_store_ahead_of_a_chunk_that_the_disk_has_lost(graph: Graph) -> None:
    """Result and journals are gone: only the lines of this chunk are sent again."""
    batch_id = graph.inferred()
    result_files(graph, batch_id)[1].unlink()
    shutil.rmtree(graph.services.settings.batches_folder / batch_id / "journal" / "0001")
    check_completed(graph, batch_id)
    assert sorted(graph.engine.lines()) == [3, 4, 5]


def journal_file(graph: Graph, batch_id: str, chunk: int) -> Path:
    return graph.services.workspace.journal_path(batch_id, chunk, 1)


def test_the_result_ahead_of_a_journal_that_the_disk_has_lost(graph: Graph) -> None:
    """The merge finds out, and lets go of the result that points into it."""
    batch_id = graph.inferred()
    journal_file(graph, batch_id, 1).unlink()
    (merge,) = graph.step()
    assert not merge.success
    check_completed(graph, batch_id)
    assert sorted(graph.engine.lines()) == [3, 4, 5]


def test_the_result_ahead_of_a_damaged_journal(graph: Graph) -> None:
    """One flipped bit costs one line."""
    batch_id = graph.inferred()
    journal = journal_file(graph, batch_id, 1)
    content = bytearray(journal.read_bytes())
    content[len(content) // 2] ^= 1
    journal.write_bytes(content)
    (merge,) = graph.step()
    assert not merge.success
    check_completed(graph, batch_id)
    assert len(graph.engine.lines()) == 1


def test_the_store_ahead_of_a_disk_without_the_whole_folder(graph: Graph) -> None:
    batch_id = graph.inferred()
    shutil.rmtree(graph.services.settings.batches_folder / batch_id)
    check_completed(graph, batch_id)
    assert sorted(graph.engine.lines()) == list(range(LINES))


def test_the_store_ahead_of_the_byte_index(graph: Graph) -> None:
    """It is written anew from the input file, before the merge too."""
    batch_id = graph.inferred()
    (graph.services.settings.batches_folder / batch_id / "index.bin").unlink()
    check_completed(graph, batch_id)
    assert graph.engine.lines() == []


def test_a_lost_result_of_a_batch_that_is_cancelled(graph: Graph) -> None:
    """The merge of a stopping batch seals what the journals hold, also where a result was published before."""
    batch_id = graph.validated()
    assert graph.run_chunks(batch_id, 0, 1).success
    result_files(graph, batch_id)[0].unlink()
    cancel_batch(batch_id, graph.services.store, graph.services.clock)
    batch = graph.finish(batch_id)
    assert batch.status is BatchStatus.CANCELLED
    assert graph.custom_ids(batch.output_file_id) == every_id(6)
    assert (batch.counts.completed, batch.counts.failed) == (6, 2)


def test_the_store_ahead_of_the_graph_that_never_saw_the_end(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run died between the batch's last status and its materialization: nothing is merged a second time."""
    batch_id = graph.inferred()
    with monkeypatch.context() as patched:
        patched.setattr("vllm_batch_dagster.defs.assets.describe_merge", _die)
        assert not graph.run("finalize_batch", batch_id).success
    first = graph.batch(batch_id)
    assert first.status is BatchStatus.COMPLETED
    graph.step()
    assert graph.batch(batch_id).output_file_id == first.output_file_id


def _die(*_: object) -> None:
    raise RuntimeError("the run dies here")
