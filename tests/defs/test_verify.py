"""`vllm-batch verify` on what the graph has made: real store and files, the manifest in the UI's metadata."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.defs.graph import Graph, values
from vllm_batch_dagster.cli.main import app
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.stages.manifests import read_manifest


@pytest.fixture(autouse=True)
def home(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the command find the state folder of the graph."""
    folder = graph.services.settings.vllm_batch_home
    monkeypatch.setenv("VLLM_BATCH_HOME", str(folder))
    return folder


def verify(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["verify", *arguments], catch_exceptions=False)


def verify_json(batch_id: str) -> tuple[int, dict[str, Any]]:
    result = verify(batch_id, "--json")
    return result.exit_code, json.loads(result.stdout)


def test_a_good_batch_ends_with_0_and_says_what_was_checked(graph: Graph) -> None:
    batch_id = graph.merged()
    code, report = verify_json(batch_id)
    assert (code, report["ok"], report["problems"], report["notes"]) == (0, True, [], [])
    assert (report["checked"]["lines"], report["checked"]["answers"], report["published"]) == (8, 8, True)
    result = verify(batch_id)
    assert result.exit_code == 0
    assert "good" in result.stdout


def test_a_changed_byte_ends_with_1_and_is_named_with_its_mend(graph: Graph, home: Path) -> None:
    batch_id = graph.merged()
    file_id = str(graph.batch(batch_id).output_file_id)
    path = home / "files" / file_id
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    code, report = verify_json(batch_id)
    assert code == 1
    (problem,) = report["problems"]
    assert (problem["kind"], problem["file"], problem["line"], problem["offset"]) == ("output", file_id, 1, 100)
    result = verify(batch_id)
    assert result.exit_code == 1
    assert file_id in result.stdout
    assert f"partition {batch_id} of" in result.stdout
    assert graph.run("finalize_batch", batch_id).success  # the mend
    assert verify_json(batch_id)[0] == 0


def test_the_mend_of_a_damaged_journal_works(graph: Graph, home: Path) -> None:
    batch_id = graph.merged()
    path = home / "batches" / batch_id / "journal" / "0001" / "000001.jsonl"
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    code, report = verify_json(batch_id)
    assert code == 1
    assert f"{batch_id}|0001 of chunk_results" in report["problems"][0]["mend"]
    graph.run_chunks(batch_id, 1, 1)
    assert graph.run("finalize_batch", batch_id).success
    code, report = verify_json(batch_id)
    # The damaged journal is still there, and no answer is read from it any more.
    assert (code, [problem["kind"] for problem in report["problems"]]) == (0, [])


def test_the_mend_of_a_damaged_index_works(graph: Graph, home: Path) -> None:
    batch_id = graph.merged()
    path = home / "batches" / batch_id / "index.bin"
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)
    assert verify_json(batch_id)[0] == 1
    assert graph.run("validate_batch", batch_id).success
    assert verify_json(batch_id)[0] == 0


def test_an_unknown_batch_is_said_to_be_unknown(graph: Graph) -> None:
    graph.services.store.batches.list()
    with pytest.raises(NotFound):
        verify("batch_none")


def test_the_ui_shows_the_manifest_and_what_gave_the_answers(graph: Graph) -> None:
    batch_id = graph.merged()
    metadata = values(graph.shown("merged_output", batch_id)[0].metadata)
    manifest = read_manifest(Path(metadata["manifest"]))
    assert manifest.batch == batch_id
    assert manifest.output is not None
    assert metadata["output_sha256"] == manifest.output.sha256
    assert manifest.input is not None
    assert metadata["input_sha256"] == manifest.input.sha256
    assert "| model | weights | engine |" in metadata["answered_by"]
    assert [len(chunk.origins) for chunk in manifest.chunks] == [1, 1, 1]
    assert None not in manifest.chunks[0].origins
