"""The examples of README.md and docs/handlers.md run as they stand. Those of docs/api.md have their own test."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handlers.base import ResultHandler, Results, Undeliverable
from handlers.courier import HandlerCourier
from handlers.testing import three_kinds
from vllm_batch_dagster.adapters.catalog import read_models
from vllm_batch_dagster.adapters.local_files import LocalFiles
from vllm_batch_dagster.core.deliveries import new_delivery
from vllm_batch_dagster.core.ports import OutboxEvent
from vllm_batch_dagster.settings import PROJECT_ROOT

API = "http://localhost:4080"


def blocks(page: str, heading: str, language: str) -> list[str]:
    """Return the code blocks of one section of a page."""
    section = re.split(r"^##+ ", (PROJECT_ROOT / page).read_text(), flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(heading + "\n"))
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_curl_example_completes_a_batch(base_url: str, checkout: Path) -> None:
    (example,) = blocks("README.md", "Use it with curl", "bash")
    script = "set -euo pipefail\n" + example.replace(API, base_url)

    run = subprocess.run(["bash", "-c", script], cwd=checkout, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (checkout / "results.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["one", "two"]
    assert all(line["response"]["status_code"] == 200 for line in lines)


def test_the_sdk_example_prints_every_answer(base_url: str, checkout: Path) -> None:
    (example,) = blocks("README.md", "Use it with the openai SDK", "python")

    run = subprocess.run(
        [sys.executable, "-c", example.replace(API, base_url)],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    asked = [json.loads(line)["custom_id"] for line in (checkout / "examples/questions.jsonl").open()]
    assert len(asked) == 40
    printed = [line.split(" ")[0] for line in run.stdout.splitlines()]
    assert [name for name in printed if name in asked] == asked


def test_the_handler_of_the_page_delivers_once(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks("docs/handlers.md", "Write one", "python")
    names: dict[str, Any] = {}
    exec(compile(example, "docs/handlers.md", "exec"), names)
    handler = names["SqliteHandler"]()
    monkeypatch.chdir(checkout)
    good = {"custom_id": "a", "response": {"status_code": 200, "body": {}}, "error": None}
    rejected = {"custom_id": "b", "response": {"status_code": 400, "body": {}}, "error": None}
    unanswered = {"custom_id": "c", "response": None, "error": {"code": "batch_expired"}}

    def lines() -> Iterator[bytes]:
        return iter([json.dumps(line).encode() for line in (good, rejected, unanswered)])

    assert isinstance(handler, ResultHandler)
    assert handler.enabled()
    assert handler.handle("batch_1", Results(lines), {})
    assert handler.handle("batch_1", Results(lines), {})

    rows = sqlite3.connect("answers.db").execute("SELECT batch, custom_id FROM answers").fetchall()
    assert rows == [("batch_1", "a")]


def test_the_seeds_handler_of_the_page_runs_unchanged(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a batch meets it: from the file that HANDLER_MODULES names."""
    (example,) = blocks("docs/handlers.md", "Your first handler", "python")
    (checkout / "my_handler.py").write_text(example)
    monkeypatch.chdir(checkout)
    files = LocalFiles(checkout / "files")
    stored = files.create("file-output")
    stored.write(b'{"custom_id":"a"}\n')
    stored.commit()
    courier = HandlerCourier(files, limit_seconds=9, modules=["my_handler.py"], allowed=["my_handler"])
    case = three_kinds("batch_1").delivery()
    batch, event = replace(case.batch, error_file_id=None), OutboxEvent("evt_1", "batch_1", "batch.completed", 1, 1)

    assert courier.targets(batch, event) == ["handler:my_handler"]
    delivery = new_delivery("batch_1", "evt_1", "handler:my_handler", 1, version=1)
    assert courier.attempt(delivery, batch, event).is_delivered


def test_the_typed_handler_of_the_page_keeps_a_copy(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks("docs/handlers.md", "The typed interface", "python")
    names: dict[str, Any] = {}
    exec(compile(example, "docs/handlers.md", "exec"), names)
    monkeypatch.chdir(checkout)
    case = three_kinds("batch_1", version=7)

    names["ArchiveHandler"]().deliver(case.delivery())

    copied = (checkout / "archive" / "batch_1.7.jsonl").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in copied] == ["a", "b"]
    with pytest.raises(Undeliverable):
        names["ArchiveHandler"]().deliver(replace(case, output=()).delivery())


def test_the_contract_of_the_page_runs(checkout: Path) -> None:
    (example,) = blocks("docs/handlers.md", "Test it", "python")
    (checkout / "test_mine.py").write_text(example)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "test_mine.py"]
    env = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}

    run = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout
    assert "10 passed" in run.stdout


def test_the_catalogues_of_the_page_can_be_read(tmp_path: Path) -> None:
    page = (PROJECT_ROOT / "docs" / "models.md").read_text()
    examples = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        catalogue = tmp_path / "models.yaml"
        catalogue.write_text(example)
        assert read_models(catalogue)
