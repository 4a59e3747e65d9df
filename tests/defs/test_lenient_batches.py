"""Lenient batches through the graph: bad lines are a warning, and the engine is swapped once a model."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import dagster as dg
import pytest

from tests.defs.graph import Graph, chat_line, checks, rows, values
from vllm_batch_dagster.core.models import Model, RequestCounts
from vllm_batch_dagster.core.ports import EngineLease, Report
from vllm_batch_dagster.core.states import BatchStatus

TWO_MODELS = "models:\n  - name: tiny\n    path: someone/tiny\n  - name: other\n    path: someone/other\n"


def line(number: int, model: str) -> bytes:
    return chat_line(number, body={"model": model, "messages": [{"role": "user", "content": "hi"}]})


def test_models_that_alternate_are_leased_once_each(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Graph(tmp_path, instance)
    (tmp_path / "models.yaml").write_text(TWO_MODELS)
    lines = [line(number, "other" if number % 2 else "tiny") for number in range(10)]
    batch_id = graph.submit([*lines[:5], b"nonsense", *lines[5:]], metadata={"validation": "lenient"})
    leases: list[str] = []
    lease = graph.services.engines.lease

    def watch(model: Model, report: Report) -> AbstractAsyncContextManager[EngineLease]:
        leases.append(model.name)
        return lease(model, report)

    monkeypatch.setattr(graph.services.engines, "lease", watch)
    batch = graph.finish(batch_id)
    assert leases == ["tiny", "other"]
    assert [chunk.range.model for chunk in graph.services.store.chunks.list(batch_id)] == ["tiny"] * 2 + ["other"] * 2
    assert (batch.status, batch.model) == (BatchStatus.COMPLETED, None)
    assert batch.counts == RequestCounts(11, 10, 1)
    assert graph.custom_ids(batch.output_file_id) == [f"line-{number}" for number in range(10)]
    assert graph.custom_ids(batch.error_file_id) == ["invalid-line-6"]


def test_bad_lines_are_shown_and_do_not_stop_the_batch(graph: Graph) -> None:
    batch_id = graph.admit([chat_line(0), b"nonsense", chat_line(2, url="/v1/x")], metadata={"validation": "lenient"})
    result = graph.run("validate_batch", batch_id)
    assert result.success
    assert checks(result) == {("lines_valid", None): False}
    (shown,) = graph.shown("validated_input", batch_id)
    metadata = values(shown.metadata)
    assert (metadata["requests"], metadata["invalid_lines"], metadata["chunks"]) == (3, 2, 1)
    assert [row["line"] for row in rows(shown.metadata["errors"])] == [2, 3]
    assert graph.batch(batch_id).status is BatchStatus.IN_PROGRESS
