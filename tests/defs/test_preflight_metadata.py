"""What `validated_input` shows of the pre-flight: counted tokens, and a run time learned from earlier batches."""

import pytest

from tests.defs.graph import Graph, chat_line, values
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.models import ChunkSummary, RequestCounts, Usage
from vllm_batch_dagster.defs import preflight


def shown(graph: Graph, batch_id: str) -> dict[str, object]:
    assert graph.run("validate_batch", batch_id).success
    return dict(values(graph.shown("validated_input", batch_id)[0].metadata))


def test_a_valid_input_is_measured(graph: Graph) -> None:
    metadata = shown(graph, graph.admit(8))
    assert metadata["counted_lines"] == 8
    assert "Tokens per request" in str(metadata["counted_lengths"])
    assert "All 8 lines were counted" in str(metadata["preflight"])
    assert "no history of tiny" in str(metadata["preflight"])
    assert "estimated_run_s" not in metadata


def test_finished_chunks_of_the_model_give_an_estimate(graph: Graph) -> None:
    earlier, chunks = graph.validated(), graph.services.store.chunks
    attempt = chunks.begin(earlier, 0, fresh=False, run_id="run", now=1)
    counts, usage = RequestCounts(3, 3, 0), Usage(50, 0, 50)
    chunks.publish(attempt, ChunkSummary(counts, usage, last_answer_at=10.0, first_sent_at=1.0, sent_tokens=100), 2)

    metadata = shown(graph, graph.admit(8))

    low, middle, high = (metadata[f"estimated_run_{name}"] for name in ("low_s", "s", "high_s"))
    assert 0 < low < middle < high  # type: ignore[operator]
    assert "only 1 finished chunk " in str(metadata["preflight"])


def test_a_bad_input_is_not_measured(graph: Graph) -> None:
    assert "preflight" not in shown(graph, graph.admit([chat_line(0), b"{broken"]))


def test_a_preflight_that_fails_does_not_fail_the_validation(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageFailure("the disk is away")

    monkeypatch.setattr(preflight, "sketch_input", fail)
    assert shown(graph, graph.admit(2))["preflight"] == "not available: the disk is away"
