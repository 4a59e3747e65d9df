"""POST /v1/batches/validate over HTTP and on the command line: a report, and nothing that is left of it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.api.conftest import BATCH_PARAMS
from tests.unit.conftest import request_line, request_lines
from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.cli.validate import describe_seconds
from vllm_batch_dagster.core.models import Batch, ChunkRange, ChunkSummary, RequestCounts, Usage
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.settings import Settings

Upload = Callable[..., dict[str, Any]]


def ask(client: TestClient, **params: object) -> dict[str, Any]:
    answer = client.post("/v1/batches/validate", json={**BATCH_PARAMS, **params})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def make_history(store: BatchStore, clock: FixedClock) -> None:
    """A completed batch of the model: one chunk, 1000 tokens in 10 seconds."""
    now = int(clock())
    store.batches.add(Batch("batch_1", "file-1", "/v1/x", "24h", BatchStatus.IN_PROGRESS, now, now + 99, model="tiny"))
    store.chunks.plan("batch_1", [ChunkRange(0, 0, 10, 0, 100, "tiny")])
    attempt = store.chunks.begin("batch_1", 0, fresh=False, run_id="run", now=now)
    counts, usage = RequestCounts(10, 10, 0), Usage(500, 0, 500)
    summary = ChunkSummary(counts, usage, first_sent_at=0.0, last_answer_at=10.0, sent=10, sent_tokens=1000)
    store.chunks.publish(attempt, summary, now)


def test_the_report_of_a_good_file(client: TestClient, upload: Upload, store: BatchStore, clock: FixedClock) -> None:
    make_history(store, clock)
    report = ask(client, input_file_id=upload(request_lines(20))["id"])
    assert report["object"] == "batch.validation"
    assert (report["valid"], report["lines"], report["model"], report["errors"]) == (True, 20, "tiny", None)
    assert report["duplicates"] == {"custom_ids": 0, "requests": 0, "exact": True}
    assert report["tokens"]["counted_lines"] == 20
    assert sum(bucket["lines"] for bucket in report["tokens"]["histogram"]) == 20
    (load,) = report["models"]
    assert (load["tokenizer"], load["max_model_len"]) == ("estimate", None)
    assert "not on this machine" in load["note"]
    time = report["run_time"]
    assert 0 < time["low"] < time["seconds"] < time["high"]
    assert "only 1 finished chunk " in time["note"]


def test_without_history_it_says_so(client: TestClient, upload: Upload) -> None:
    time = ask(client, input_file_id=upload(request_lines(1))["id"])["run_time"]
    assert (time["seconds"], time["low"], time["high"], time["chunks"]) == (None, None, None, 0)
    assert "no history of tiny" in time["note"]


def test_bad_lines_are_listed_as_on_a_failed_batch(client: TestClient, upload: Upload, settings: Settings) -> None:
    content = request_line("a") + b"nonsense\n" + request_line("a") + request_line("b", url="/v1/x")
    report = ask(client, input_file_id=upload(content)["id"])
    assert not report["valid"]
    found = [(error["line"], error["code"]) for error in report["errors"]["data"]]
    assert found == [(2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "invalid_url")]
    assert report["duplicates"]["custom_ids"] == 1
    assert not report["errors_truncated"]
    many = ask(client, input_file_id=upload(b"x\n" * (settings.max_validation_errors + 5))["id"])
    assert len(many["errors"]["data"]) == settings.max_validation_errors
    assert many["errors_truncated"]


def test_lenient_mode_runs_beside_bad_lines(client: TestClient, upload: Upload) -> None:
    content = request_line("a") + b"nonsense\n"
    report = ask(client, input_file_id=upload(content)["id"], metadata={"validation": "lenient"})
    assert (report["valid"], report["rejected_lines"]) == (True, 1)
    assert report["errors"]["data"][0]["line"] == 2


def test_a_file_that_does_not_exist_is_what_fails_a_batch(client: TestClient) -> None:
    report = ask(client, input_file_id="file-none")
    assert not report["valid"]
    assert report["errors"]["data"][0]["param"] == "file_id"
    assert (report["tokens"], report["duplicates"], report["run_time"], report["models"]) == (None, None, None, [])


def test_wrong_parameters_are_those_of_a_batch(client: TestClient) -> None:
    for wrong in ({"endpoint": "/v1/nothing"}, {"completion_window": "soon"}, {"metadata": 7}):
        real = client.post("/v1/batches", json={**BATCH_PARAMS, **wrong})
        dry = client.post("/v1/batches/validate", json={**BATCH_PARAMS, **wrong})
        assert (dry.status_code, dry.json()) == (400, real.json())


def test_nothing_is_made(
    client: TestClient, upload: Upload, settings: Settings, stored_files: Callable[[], int]
) -> None:
    file_id = upload(request_lines(50))["id"]
    before = stored_files()
    ask(client, input_file_id=file_id)
    assert client.get("/v1/batches").json()["data"] == []
    assert stored_files() == before
    assert not settings.batches_folder.exists()
    assert not settings.engine_folder.exists()


def test_another_projects_file_does_not_exist(client: TestClient, upload: Upload, new_key: Callable[..., str]) -> None:
    own, other = new_key("own"), new_key("other")
    client.headers["authorization"] = f"Bearer {own}"
    file_id = upload(request_lines(1))["id"]
    assert ask(client, input_file_id=file_id)["valid"]
    client.headers["authorization"] = f"Bearer {other}"
    report = ask(client, input_file_id=file_id)
    assert not report["valid"]


@pytest.fixture
def command(base_url: str) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run `vllm-batch validate` against the API as its own process."""

    def command(*words: object) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "vllm_batch_dagster.cli", "validate", *map(str, words)]
        environment = {**os.environ, "API_PORT": base_url.rpartition(":")[2]}
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)

    return command


def test_the_command_shows_tables_and_leaves_no_file(
    command: Callable[..., Any], tmp_path: Path, app: FastAPI, store: BatchStore, clock: FixedClock
) -> None:
    make_history(store, clock)
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_bytes(request_lines(3))
    bad.write_bytes(request_line("a") + b"nonsense\n" * 30)

    shown = command(good)
    assert shown.returncode == 0, shown.stderr
    assert all(words in shown.stdout for words in ("valid", "input tokens", "run time", "Tokens per request"))
    refused = command(bad)
    assert refused.returncode == 1
    assert all(words in refused.stdout for words in ("not valid", "invalid_json_line", "and 20 more"))
    read = json.loads(command(good, "--json").stdout)
    assert read["lines"] == 3
    assert store.files.list().data == ()
    missing = command(good, "--endpoint", "/v1/embeddings")
    assert missing.returncode == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((1.0, 0.5, 2.0), "1.0 s (0.5 s to 2.0 s)"),
        ((90.0, 60.0, 120.0), "90 s (60 s to 2 min)"),
        ((7200.0, 3600.0, 14_400.0), "2.0 h (60 min to 4.0 h)"),
        ((None, None, None), "not known"),
    ],
)
def test_durations_are_spelled(seconds: tuple[float | None, float | None, float | None], text: str) -> None:
    assert describe_seconds(*seconds) == text
