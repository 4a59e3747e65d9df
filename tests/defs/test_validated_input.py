"""The `validated_input` asset: what it shows of a good and of a bad file, and what it leaves in the store."""

import pytest

from tests.defs.graph import SLOTS, Graph, chat_line, checks, materialized, rows, values
from vllm_batch_dagster.core.states import BatchStatus


def test_a_good_file(graph: Graph) -> None:
    batch_id = graph.admit(8)
    result = graph.run("validate_batch", batch_id)
    assert result.success
    assert materialized(result) == [("validated_input", batch_id)]
    assert checks(result) == {("lines_valid", None): True}
    (shown,) = graph.shown("validated_input", batch_id)
    metadata = values(shown.metadata)
    assert (metadata["requests"], metadata["chunks"], metadata["invalid_lines"]) == (8, 3, 0)
    assert metadata["model"] == "tiny"
    assert metadata["bytes"] == graph.services.store.files.get(graph.batch(batch_id).input_file_id).bytes
    assert metadata["estimated_tokens_in"] >= 8
    assert "Estimated tokens per request" in metadata["request_lengths"]
    assert f"http://127.0.0.1:4080/v1/batches/{batch_id}" in metadata["batch"]
    assert "errors" not in metadata
    assert graph.batch(batch_id).status is BatchStatus.IN_PROGRESS
    assert graph.engine.asked == [], "no engine is touched"


def test_slots_that_are_not_needed_are_shown_as_empty(graph: Graph) -> None:
    batch_id = graph.validated()
    assert [len(graph.shown_chunk(batch_id, index)) for index in range(SLOTS)] == [0, 0, 0, 1]
    assert graph.shown_chunk(batch_id, 3)[0].metadata["requests"].value == 0


def test_a_bad_file(graph: Graph) -> None:
    batch_id = graph.admit([chat_line(0), b"{broken", chat_line(0), chat_line(3, method="GET")])
    result = graph.run("validate_batch", batch_id)
    assert result.success, "that the input is bad is a result and no failure of the run"
    assert checks(result) == {("lines_valid", None): False}
    (shown,) = graph.shown("validated_input", batch_id)
    metadata = values(shown.metadata)
    assert (metadata["chunks"], metadata["invalid_lines"]) == (0, 3)
    errors = rows(shown.metadata["errors"])
    assert [row["line"] for row in errors] == [2, 3, 4]
    assert [row["code"] for row in errors][1] == "duplicate_custom_id"
    assert all(row["message"] for row in errors)
    batch = graph.batch(batch_id)
    assert batch.status is BatchStatus.FAILED
    assert [error.line for error in batch.errors] == [2, 3, 4]
    assert all(graph.shown_chunk(batch_id, index) == [] for index in range(SLOTS))


def test_a_long_list_of_errors_is_cut_in_the_ui_only(graph: Graph) -> None:
    batch_id = graph.admit([b"x"] * 60)
    graph.run("validate_batch", batch_id)
    metadata = graph.shown("validated_input", batch_id)[0].metadata
    assert metadata["invalid_lines"].value == 60
    assert len(rows(metadata["errors"])) == 50
    assert len(graph.batch(batch_id).errors) == 60


def test_again_for_a_finished_batch_changes_nothing(graph: Graph) -> None:
    batch_id = graph.merged()
    before = graph.batch(batch_id)
    assert graph.run("validate_batch", batch_id).success
    assert graph.batch(batch_id) == before


def test_a_good_batch_warms_the_engine_and_a_bad_one_does_not(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[str | None] = []
    monkeypatch.setattr(graph.services.engines, "warm", lambda model, _report: warmed.append(model.name))
    graph.validated([b"nonsense"])
    assert warmed == []
    batch_id = graph.validated()
    assert warmed == [graph.batch(batch_id).model]
    graph.run("validate_batch", batch_id)
    assert len(warmed) == 1, "a batch that is past validation has its engine when it needs it"
