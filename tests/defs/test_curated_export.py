"""The `curated_export` asset: a Parquet data set of a finished batch, and a selection for review beside it."""

import socket
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import polars
import pytest

from tests.defs.curating import ask_schedule
from tests.defs.graph import Graph, chat_line, chat_lines, checks, every_id, line_of, refuse, said, values
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.defs.curation import OFF
from vllm_batch_dagster.stages.push_records import PushState, read_push

# An instance on disk: slow on a busy machine.
pytestmark = pytest.mark.timeout(300)

KEY = "0123456789abcdef0123456789abcdef01234567"


def read(folder: str) -> polars.DataFrame:
    return polars.read_parquet(Path(folder) / "*.parquet", hive_partitioning=False)


def test_a_parquet_dataset(graph: Graph) -> None:
    batch_id = graph.merged()
    metadata = values(graph.shown("curated_export", batch_id)[0].metadata)
    assert (metadata["rows"], metadata["refused"]) == (8, 0)
    folder = Path(metadata["dataset"])
    assert folder == graph.services.settings.datasets_folder / "curated" / f"batch={batch_id}"
    rows = read(metadata["dataset"])
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


def test_again_replaces_the_dataset(graph: Graph) -> None:
    batch_id = graph.merged()
    assert graph.run("finalize_batch", batch_id).success
    folder = graph.services.settings.datasets_folder / "curated" / f"batch={batch_id}"
    assert len(read(str(folder))) == 8


def test_the_rules_of_a_file(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    """They are read anew by each run, and shown with their digest."""
    rules = tmp_path / "curation.yaml"
    rules.write_text("dataset: {min_output_tokens: 6}\nreview: {rules: [{rule: random, name: spot check, n: 2}]}")
    graph = Graph(tmp_path, instance, curation_file=rules)
    graph.engine.reply = lambda request: said(request, "five tokens")
    batch_id = graph.merged(5)
    metadata = values(graph.shown("curated_export", batch_id)[0].metadata)
    assert (metadata["rows"], metadata["refused"], metadata["selected"]) == (0, 5, 2)
    assert metadata["rules"] == str(rules)
    assert "| spot check | 2 |" in metadata["selected_by_rule"]
    selection = read(metadata["selection"])
    assert selection["rules"].to_list() == [["spot check"]] * 2
    rules.write_text("review: {cap: 0}")
    assert graph.run("curate_batch", batch_id).success
    again = values(graph.shown("curated_export", batch_id)[0].metadata)
    assert (again["rows"], again["selected"]) == (5, 0)
    assert again["rules_digest"] != metadata["rules_digest"]


def test_a_file_with_a_mistake_fails_the_run_and_not_the_batch(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    rules = tmp_path / "curation.yaml"
    graph = Graph(tmp_path, instance, curation_file=rules)
    batch_id = graph.inferred()
    rules.write_text("review: {cap: many}")
    result = graph.run("finalize_batch", batch_id)
    assert not result.success
    (failure,) = (event for event in result.all_events if event.is_step_failure)
    assert failure.step_key == "curated_export"
    assert "review.cap: Input should be a valid integer" in str(failure.step_failure_data.error)
    assert graph.batch(batch_id).status.value == "completed"


def test_without_label_studio_it_says_so_and_is_green(graph: Graph) -> None:
    batch_id = graph.inferred()
    result = graph.run("finalize_batch", batch_id)
    assert checks(result)["tasks_pushed", batch_id]
    metadata = values(graph.shown("curated_export", batch_id)[0].metadata)
    assert metadata["label_studio"] == OFF
    assert metadata["rules"] == "defaults"
    record = read_push(Path(metadata["selection"]))
    assert record is not None
    assert record.state is PushState.OFF
    assert ask_schedule(graph) == OFF


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """A schedule sees only an instance that others could open."""
    home = tmp_path / "dagster"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        yield instance


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Nobody listens there, and nobody else gets it."""
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        yield plug.getsockname()[1]


def test_a_push_that_fails_is_a_warning_and_is_asked_for_again(
    tmp_path: Path, kept: dg.DagsterInstance, closed_port: int
) -> None:
    url = f"http://127.0.0.1:{closed_port}"
    graph = Graph(tmp_path, kept, label_studio_url=url, label_studio_api_key=KEY)
    batch_id = graph.inferred()
    result = graph.run("finalize_batch", batch_id)
    assert result.success
    assert graph.batch(batch_id).status.value == "completed"
    assert not checks(result)["tasks_pushed", batch_id]
    metadata = values(graph.shown("curated_export", batch_id)[0].metadata)
    assert metadata["rows"] == 8
    assert metadata["label_studio"].startswith("failed: no answer from Label Studio")
    assert ask_schedule(graph) == [batch_id]
    events = kept.all_logs(result.run_id)
    assert not any(KEY in str(event) for event in events)
    kept.create_run_for_job(graph.definitions.resolve_job_def("curate_batch"), tags={"dagster/partition": batch_id})
    assert ask_schedule(graph) == "every selection has reached Label Studio"


def test_what_was_off_or_is_gone_is_not_asked_for(tmp_path: Path, kept: dg.DagsterInstance, closed_port: int) -> None:
    off = Graph(tmp_path, kept)
    off.merged()
    url = f"http://127.0.0.1:{closed_port}"
    graph = Graph(tmp_path, kept, label_studio_url=url, label_studio_api_key=KEY)
    assert ask_schedule(graph) == "every selection has reached Label Studio"
    # The selection of a batch that no longer exists, and one that is being written.
    for name in ("batch=batch_gone", "batch=batch_other.new"):
        (graph.services.settings.datasets_folder / "review" / name).mkdir()
    assert ask_schedule(graph) == "every selection has reached Label Studio"


def test_a_selection_whose_push_was_cut_counts_as_failed(
    tmp_path: Path, kept: dg.DagsterInstance, closed_port: int
) -> None:
    graph = Graph(tmp_path, kept)
    batch_id = graph.merged()
    selection = values(graph.shown("curated_export", batch_id)[0].metadata)["selection"]
    (Path(selection) / "push.json").unlink()
    url = f"http://127.0.0.1:{closed_port}"
    assert ask_schedule(Graph(tmp_path, kept, label_studio_url=url, label_studio_api_key=KEY)) == [batch_id]


def test_a_batch_without_answers(graph: Graph) -> None:
    graph.engine.reply = refuse
    batch_id = graph.merged(2)
    metadata = values(graph.shown("curated_export", batch_id)[0].metadata)
    assert (metadata["rows"], metadata["selected"]) == (0, 0)
    assert isinstance(graph.batch(batch_id), Batch)
