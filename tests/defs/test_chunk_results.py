"""The `chunk_results` asset: what a range run shows, asks the engine, and leaves out."""

from pathlib import Path

import dagster as dg
import pytest

from tests.defs.graph import (
    RANGE_END,
    RANGE_START,
    SLOTS,
    Graph,
    checks,
    data_version,
    every_id,
    line_of,
    materialized,
    refuse,
    rows,
    said,
    values,
)
from vllm_batch_dagster.core.ports import EngineRequest
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.defs.partitions import cell_key
from vllm_batch_dagster.stages.intake import cancel_batch


def test_a_range(graph: Graph) -> None:
    """One materialization and two checks for each chunk, as it finishes, and the empty slot too."""
    batch_id = graph.validated()
    result = graph.run_chunks(batch_id, 0, SLOTS - 1)
    assert result.success
    cells = [str(cell_key(batch_id, index)) for index in range(SLOTS)]
    assert sorted(materialized(result)) == [("chunk_results", cell) for cell in cells]
    expected = {(check, cell): True for cell in cells[:3] for check in ("every_line_answered", "error_rate")}
    assert checks(result) == expected
    assert graph.engine.lines() == list(range(8))
    assert graph.batch(batch_id).counts.completed == 8


def test_metadata(graph: Graph) -> None:
    graph.engine.reply = lambda request: said(request, "five tokens")
    batch_id = graph.inferred()
    chunk = graph.services.store.chunks.get(batch_id, 2)
    (shown,) = graph.shown_chunk(batch_id, 2)
    metadata = values(shown.metadata)
    assert chunk.summary is not None
    assert chunk.summary.inference_seconds > 0
    seconds = chunk.summary.inference_seconds
    assert metadata["tokens_per_s"] == round((2 * 2 + 2 * 5) / seconds, 1)
    assert metadata["duration_s"] == round(seconds, 3)
    exact = {name: metadata[name] for name in ("requests", "completed", "errors", "error_rate", "attempt")}
    assert exact == {"requests": 2, "completed": 2, "errors": 0, "error_rate": 0.0, "attempt": 1}
    assert (metadata["tokens_in"], metadata["tokens_out"]) == (4, 10)
    assert (metadata["sent"], metadata["resumed_from_journal"]) == (2, 0)
    assert (metadata["latency_p50_s"], metadata["latency_p95_s"]) == (0.1, 0.1)
    assert "engine_memory" not in metadata, "no engine of ours ran"
    assert f"http://127.0.0.1:4080/v1/batches/{batch_id}" in metadata["batch"]
    for asset in ("validated_input", "merged_output"):
        assert f"/assets/{asset}?view=partitions&partition={batch_id}" in metadata[asset]
    assert "Output tokens" in metadata["output_lengths"]
    assert "Input tokens" in metadata["input_lengths"]
    assert "| stop | 2 |" in metadata["finish_reasons"]


def test_prompts_stay_out_of_the_ui(graph: Graph) -> None:
    batch_id = graph.inferred()
    for index in range(3):
        (shown,) = graph.shown_chunk(batch_id, index)
        assert "samples" not in shown.metadata
        assert "question" not in repr(shown.metadata)


def test_samples_when_they_are_wanted(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    graph = Graph(tmp_path, instance, ui_samples=True)
    graph.engine.reply = lambda request: said(request, "an answer " + "x" * 500)
    batch_id = graph.inferred(3)
    (shown,) = graph.shown_chunk(batch_id, 0)
    samples = rows(shown.metadata["samples"])
    assert [sample["custom_id"] for sample in samples] == every_id(3)
    assert [sample["prompt"] for sample in samples] == [f"question {number}" for number in range(3)]
    assert all(sample["answer"].startswith("an answer x") and len(sample["answer"]) <= 300 for sample in samples)


def test_a_large_chunk_shows_a_few_samples(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    graph = Graph(tmp_path, instance, ui_samples=True, chunk_size=20)
    (shown,) = graph.shown_chunk(graph.inferred(20), 0)
    assert 0 < len(rows(shown.metadata["samples"])) <= 10


def test_the_sample_of_a_refused_line_is_its_message(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    graph = Graph(tmp_path, instance, ui_samples=True)
    graph.engine.reply = refuse
    (shown,) = graph.shown_chunk(graph.inferred(1), 0)
    (sample,) = rows(shown.metadata["samples"])
    assert "too hot" in sample["answer"]
    assert "400" in sample["answer"]


def test_refused_lines_make_the_error_rate_fail(graph: Graph) -> None:
    graph.engine.reply = lambda request: refuse(request) if line_of(request) == 1 else None
    batch_id = graph.validated(3)
    result = graph.run_chunks(batch_id, 0, 0)
    cell = str(cell_key(batch_id, 0))
    assert result.success
    assert checks(result) == {("every_line_answered", cell): True, ("error_rate", cell): False}
    metadata = values(graph.shown_chunk(batch_id, 0)[0].metadata)
    assert (metadata["errors"], metadata["error_rate"]) == (1, 0.3333)
    assert "400" in metadata["error_digest"]


def test_a_slot_that_is_not_needed(graph: Graph) -> None:
    """Launched by a person: it must not leave a gap in the row, and no engine is asked."""
    batch_id = graph.validated()
    result = graph.run_chunks(batch_id, 3, 3)
    assert result.success
    assert materialized(result) == [("chunk_results", str(cell_key(batch_id, 3)))]
    assert graph.shown_chunk(batch_id, 3)[0].metadata["requests"].value == 0
    assert graph.engine.asked == []


def test_before_validation_the_run_says_what_is_missing(graph: Graph) -> None:
    batch_id = graph.admit(8)
    graph.tick()
    result = graph.run_chunks(batch_id, 0, 1)
    assert not result.success
    assert "still validating" in str(result.all_node_events)
    assert materialized(result) == []


def test_one_finished_chunk_again_asks_the_engine_again(graph: Graph) -> None:
    """Also when the rerun is requested in the same second in which the answers were shown."""
    batch_id = graph.inferred()
    graph.engine.reply = lambda request: said(request, "something else")
    result = graph.run_chunks(batch_id, 1, 1)
    assert result.success
    assert graph.engine.lines() == [3, 4, 5]
    new, old = graph.shown_chunk(batch_id, 1)
    assert data_version(new) != data_version(old)
    assert (new.metadata["attempt"].value, old.metadata["attempt"].value) == (2, 1)
    assert len(graph.shown_chunk(batch_id, 0)) == 1


def test_equal_answers_keep_the_data_version(graph: Graph) -> None:
    batch_id = graph.inferred()
    graph.run_chunks(batch_id, 1, 1)
    assert graph.engine.lines() == [3, 4, 5]
    new, old = graph.shown_chunk(batch_id, 1)
    assert data_version(new) == data_version(old)


def test_a_retry_asks_only_for_what_is_missing(graph: Graph) -> None:
    """Chunks that were shown are skipped, and of the broken one the journalled lines."""
    batch_id = graph.validated()
    chunks = graph.services.store.chunks
    graph.engine.break_down(
        line=4, when=lambda: chunks.get(batch_id, 0).is_published and graph.has_journal(batch_id, 1)
    )
    failed = graph.run_chunks(batch_id, 0, SLOTS - 1)
    assert not failed.success
    assert {partition for _, partition in materialized(failed)} == {str(cell_key(batch_id, index)) for index in (0, 3)}
    graph.engine.lines()

    graph.engine.mend()
    retried = graph.run_chunks(batch_id, 0, SLOTS - 1, parent=failed.dagster_run)
    assert retried.success
    assert graph.engine.lines() == [4, 5, 6, 7]
    again = {partition for _, partition in materialized(retried)}
    assert again == {str(cell_key(batch_id, index)) for index in (1, 2, 3)}
    assert values(graph.shown_chunk(batch_id, 1)[0].metadata)["resumed_from_journal"] == 1
    assert graph.run("finalize_batch", batch_id).success
    assert graph.custom_ids(graph.batch(batch_id).output_file_id) == every_id(8)


def test_executing_a_good_run_again_asks_for_everything(graph: Graph) -> None:
    """A person pressed the button on a run that had succeeded: that is no retry."""
    batch_id = graph.validated()
    good = graph.run_chunks(batch_id, 0, 1)
    graph.engine.lines()
    again = graph.run_chunks(batch_id, 0, 1, parent=good.dagster_run)
    assert graph.engine.lines() == [0, 1, 2, 3, 4, 5]
    assert len(materialized(again)) == 2


def test_a_published_chunk_that_dagster_never_heard_of_is_only_reported(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run died between publishing and showing."""
    batch_id = graph.validated()
    with monkeypatch.context() as patched:
        patched.setattr("vllm_batch_dagster.defs.assets._show", lambda *_: iter(()))
        graph.run_chunks(batch_id, 0, 1)
    assert graph.services.store.chunks.get(batch_id, 1).is_published
    assert graph.shown_chunk(batch_id, 1) == []
    graph.engine.lines()
    (request,) = graph.tick().run_requests or ()
    result = graph.launch(request)
    assert graph.engine.lines() == [6, 7], "the third chunk alone was not published"
    assert sorted(partition for _, partition in materialized(result)) == [
        str(cell_key(batch_id, index)) for index in range(3)
    ]
    assert len(checks(result)) == 6
    assert graph.batch(batch_id).counts.completed == 8


def test_a_chunk_whose_attempts_are_used_up_is_shown_with_a_failed_check(graph: Graph) -> None:
    batch_id = graph.validated(3)
    graph.engine.break_down(line=1, when=lambda: True)
    results = [graph.run_chunks(batch_id, 0, 0) for _ in range(3)]
    assert [result.success for result in results] == [False, False, True]
    cell = str(cell_key(batch_id, 0))
    assert checks(results[-1]) == {("every_line_answered", cell): False, ("error_rate", cell): False}
    assert "engine_failure" in values(graph.shown_chunk(batch_id, 0)[0].metadata)["error_digest"]
    assert graph.run("finalize_batch", batch_id).success
    batch = graph.batch(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert graph.custom_ids(batch.output_file_id) == ["line-0"]
    assert graph.custom_ids(batch.error_file_id) == ["line-1", "line-2"]


def test_chunks_of_two_batches_in_one_run(graph: Graph) -> None:
    """A backfill of one slot over several batches is a range of the other dimension."""
    first, second = graph.validated(3), graph.validated(3)
    wanted = {RANGE_START: f"{first}|0000", RANGE_END: f"{second}|0000"}
    result = graph.run("infer_chunks", tags=wanted)
    assert result.success
    assert sorted(materialized(result)) == sorted(
        ("chunk_results", str(cell_key(batch_id, 0))) for batch_id in (first, second)
    )


def test_a_batch_that_is_cancelled_in_the_middle(graph: Graph) -> None:
    """The run ends well, what was answered is kept, the rest has its reason in the error file."""
    graph.use_engine(window=1, latency=0.05)
    batch_id = graph.admit(60)
    graph.run("validate_batch", batch_id)

    def cancel(request: EngineRequest) -> None:
        if len(graph.engine.asked) == 4:
            cancel_batch(batch_id, graph.services.store, graph.services.clock)

    graph.engine.reply = cancel
    result = graph.run_chunks(batch_id, 0, SLOTS - 1)
    assert result.success
    answered = len(graph.engine.lines())
    assert 4 <= answered < 60
    assert all(success.success for success in graph.step())
    batch = graph.batch(batch_id)
    assert batch.status is BatchStatus.CANCELLED
    done, left = graph.custom_ids(batch.output_file_id), graph.custom_ids(batch.error_file_id)
    assert done + left == every_id(60)
    assert answered - 1 <= len(done) <= answered, "what was in flight may be lost, nothing else"


def test_a_stopping_batch_is_not_begun(graph: Graph) -> None:
    batch_id = graph.validated()
    cancel_batch(batch_id, graph.services.store, graph.services.clock)
    assert graph.run_chunks(batch_id, 0, 2).success
    assert graph.engine.asked == []
