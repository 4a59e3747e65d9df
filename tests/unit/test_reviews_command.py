"""`vllm-batch reviews export`: what is written where, and what is refused."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.unit.conftest import Rig
from tests.unit.review_samples import annotation, task
from tests.unit.review_source import Project
from vllm_batch_dagster.cli.main import app
from vllm_batch_dagster.core.errors import InvalidInput, StorageFailure
from vllm_batch_dagster.stages.pulling import PullPorts, pull_reviews


@pytest.fixture
def folder(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder with an accepted, an edited and a rejected answer; the working folder is another."""
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("VLLM_BATCH_HOME", str(home))
    monkeypatch.setenv("API_PORT", "9")
    monkeypatch.chdir(work)
    project = Project()
    verdicts: list[dict[str, Any]] = [
        {"verdict": "accept"},
        {"verdict": "edit", "correction": "Rome."},
        {"verdict": "reject"},
    ]
    project.put(*(task(number, annotation(number, **each)) for number, each in enumerate(verdicts)))
    pull_reviews(project, PullPorts(rig.store, rig.files, rig.workspace, home / "datasets" / "reviewed", nullcontext))
    return work


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["reviews", "export", *arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_examples(folder: Path) -> None:
    result = run("--as", "few-shot", "--examples", "1")
    assert (result.exit_code, result.stdout) == (0, "few-shot.jsonl\n")
    assert "1 lines written; left out: 1 reject" in result.stderr
    assert lines(folder / "few-shot.jsonl")[0]["messages"][1]["content"] == "Rome."


def test_the_next_batch(folder: Path) -> None:
    result = run("--as", "next-batch", "-o", "again.jsonl", "--model", "big")
    assert (result.exit_code, result.stdout) == (0, "again.jsonl\n")
    assert "2 lines written; left out: 1 other verdict" in result.stderr
    assert [line["custom_id"] for line in lines(folder / "again.jsonl")] == ["batch_1/id-1", "batch_1/id-2"]
    assert run("--as", "next-batch", "--verdict", "accept").exit_code == 0
    assert [line["custom_id"] for line in lines(folder / "next-batch.jsonl")] == ["batch_1/id-0"]


def test_what_is_refused(folder: Path) -> None:
    assert isinstance(run("--as", "few-shot", "--submit").exception, InvalidInput)
    assert isinstance(run("--as", "next-batch", "--verdict", "good").exception, InvalidInput)
    assert isinstance(run("--as", "next-batch", "--submit").exception, StorageFailure), "nothing answers there"
    assert list(folder.iterdir()) == []
