"""The `merged_output` asset: files, metadata, and checks that fail when their fact does not hold."""

from dataclasses import replace
from typing import Any

import pytest

from tests.defs.graph import SLOTS, Graph, checks, every_id, line_of, materialized, refuse, rows, said, values
from vllm_batch_dagster.core.results import ResultTable, read_results
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.stages.intake import cancel_batch
from vllm_batch_dagster.stages.merging import MergeReport, merge_batch


def test_the_files_and_the_checks(graph: Graph) -> None:
    batch_id = graph.inferred()
    result = graph.run("finalize_batch", batch_id)
    assert result.success
    merge = {("counts_conserved", None): True, ("custom_ids_once", None): True}
    delivered = {("handlers_delivered", batch_id): True, ("webhooks_delivered", batch_id): True}
    assert checks(result) == merge | delivered | {("tasks_pushed", batch_id): True}
    assert {asset for asset, _ in materialized(result)} == {"merged_output", "deliveries", "curated_export"}
    batch = graph.batch(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert graph.custom_ids(batch.output_file_id) == every_id(8)
    assert batch.error_file_id is None


def test_metadata(graph: Graph) -> None:
    graph.engine.reply = lambda request: refuse(request) if line_of(request) == 7 else said(request, "five tokens")
    batch_id = graph.merged()
    metadata = values(graph.shown("merged_output", batch_id)[0].metadata)
    batch = graph.batch(batch_id)
    exact = {"status": "completed", "requests": 8, "completed": 7, "errors": 1, "error_rate": 0.125}
    assert {name: metadata[name] for name in exact} == exact
    assert (metadata["tokens_in"], metadata["tokens_out"]) == (14, 35)
    assert metadata["wall_s"] >= 0
    assert f"/v1/files/{batch.output_file_id}/content" in metadata["output_file"]
    assert f"/v1/files/{batch.error_file_id}/content" in metadata["error_file"]
    assert metadata["output_file_bytes"] == graph.services.store.files.get(batch.output_file_id or "").bytes
    assert "| stop | 7 |" in metadata["finish_reasons"]
    chunks = rows(graph.shown("merged_output", batch_id)[0].metadata["chunks"])
    assert [(chunk["chunk"], chunk["requests"], chunk["errors"], chunk["attempt"]) for chunk in chunks] == [
        ("0000", 3, 0, 1),
        ("0001", 3, 0, 1),
        ("0002", 2, 1, 1),
    ]
    for index in range(3):
        assert f"{batch_id}%7C000{index}" in metadata["chunk_results"]


def test_a_missing_chunk_is_named(graph: Graph) -> None:
    batch_id = graph.validated()
    graph.run_chunks(batch_id, 0, 1)
    result = graph.run("finalize_batch", batch_id)
    assert not result.success
    assert "chunks [2]" in str(result.all_node_events)
    assert graph.shown("merged_output", batch_id) == []


def test_a_merge_that_cannot_be_proved_fails_its_check_and_publishes_nothing(graph: Graph) -> None:
    batch_id = graph.inferred()
    chunk = graph.services.store.chunks.get(batch_id, 1)
    path = graph.services.workspace.result_path(batch_id, 1, chunk.published_epoch)
    with path.open("rb") as packed:
        entries = read_results(packed).entries
    table = ResultTable(len(entries))
    for position in range(len(entries)):
        table.put(position, entries[0])  # the first answer of the chunk, for all of its lines
    path.write_bytes(table.pack(""))
    result = graph.run("finalize_batch", batch_id)
    assert not result.success
    assert checks(result) == {("custom_ids_once", None): False}
    assert graph.batch(batch_id).status is BatchStatus.FINALIZING
    assert graph.batch(batch_id).output_file_id is None


def test_chunks_that_a_cancel_leaves_are_shown_by_the_merge(graph: Graph) -> None:
    batch_id = graph.validated()
    graph.run_chunks(batch_id, 0, 0)
    cancel_batch(batch_id, graph.services.store, graph.services.clock)
    assert graph.run("finalize_batch", batch_id).success
    shown = [graph.shown("chunk_results", f"{batch_id}|{index:04d}") for index in range(SLOTS)]
    assert [len(events) for events in shown] == [1] * SLOTS
    assert [values(events[0].metadata)["requests"] for events in shown][:3] == [3, 3, 2]
    assert values(shown[1][0].metadata)["errors"] == 3


@pytest.mark.parametrize(
    ("tamper", "failing"),
    [
        ({"error_lines": 1}, "counts_conserved"),
        ({"output_lines": 7}, "counts_conserved"),
        ({"problem": "input line 3 is missing"}, "custom_ids_once"),
    ],
)
def test_a_check_fails_when_its_fact_does_not_hold(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, tamper: dict[str, object], failing: str
) -> None:
    def lie(*arguments: Any, **options: Any) -> MergeReport:
        report = merge_batch(*arguments, **options)
        for name, value in tamper.items():
            setattr(report.tally, name, value)
        return report

    monkeypatch.setattr("vllm_batch_dagster.defs.assets.merge_batch", lie)
    result = graph.run("finalize_batch", graph.inferred())
    assert {name for (name, _), passed in checks(result).items() if not passed} == {failing}


@pytest.mark.parametrize("tamper", [{"completed": 7, "failed": 1}, {"total": 9}])
def test_counts_that_differ_from_the_files_fail_the_check(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, tamper: dict[str, int]
) -> None:
    """A line counted as an error that stands in the output file; a line that stands nowhere."""

    def lie(*arguments: Any, **options: Any) -> MergeReport:
        report = merge_batch(*arguments, **options)
        return replace(report, counts=replace(report.counts, **tamper))

    monkeypatch.setattr("vllm_batch_dagster.defs.assets.merge_batch", lie)
    result = graph.run("finalize_batch", graph.inferred())
    assert not checks(result)["counts_conserved", None]
    assert checks(result)["custom_ids_once", None]
