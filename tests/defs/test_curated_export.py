"""The `curated_export` asset: a Parquet data set of a finished batch."""

from pathlib import Path

import dagster as dg
import polars

from tests.defs.graph import Graph, chat_line, chat_lines, every_id, line_of, refuse, said, values


def test_a_parquet_dataset(graph: Graph) -> None:
    batch_id = graph.merged()
    metadata = values(graph.shown("curated_export", batch_id)[0].metadata)
    assert (metadata["rows"], metadata["refused"]) == (8, 0)
    folder = Path(metadata["dataset"])
    assert folder == graph.services.settings.datasets_folder / "curated" / f"batch={batch_id}"
    rows = polars.read_parquet(folder / "*.parquet")
    assert rows["custom_id"].to_list() == every_id(8)
    assert rows["prompt"].to_list() == [f"question {number}" for number in range(8)]
    assert metadata["bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_refused_rows_are_counted_by_rule(graph: Graph) -> None:
    """A line that failed, and a prompt that comes twice."""
    graph.engine.reply = lambda request: refuse(request) if line_of(request) == 1 else None
    body = {"model": "tiny", "messages": [{"role": "user", "content": "question 0"}]}
    batch_id = graph.merged([*chat_lines(3), chat_line(3, body=body)])
    metadata = values(graph.shown("curated_export", batch_id)[0].metadata)
    assert (metadata["rows"], metadata["refused"]) == (2, 2)
    assert "| request_failed | 1 |" in metadata["refused_by_rule"]
    assert "| repeated_prompt | 1 |" in metadata["refused_by_rule"]


def test_short_answers_are_left_out(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    graph = Graph(tmp_path, instance, curate_min_output_tokens=6)
    graph.engine.reply = lambda request: said(request, "five tokens")
    batch_id = graph.merged(3)
    metadata = values(graph.shown("curated_export", batch_id)[0].metadata)
    assert (metadata["rows"], metadata["refused"]) == (0, 3)


def test_again_replaces_the_dataset(graph: Graph) -> None:
    batch_id = graph.merged()
    assert graph.run("finalize_batch", batch_id).success
    folder = graph.services.settings.datasets_folder / "curated" / f"batch={batch_id}"
    assert len(polars.read_parquet(folder / "*.parquet")) == 8
