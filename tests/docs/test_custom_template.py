"""The template of a handler runs as it stands: a copy of it, found by HANDLER_MODULES, delivers and doubles nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from handlers import registry
from handlers.base import Handler
from handlers.testing import three_kinds
from vllm_batch_dagster.cli.handler_checkup import check_handlers
from vllm_batch_dagster.settings import PROJECT_ROOT, Settings

TEMPLATE = PROJECT_ROOT / "handlers" / "examples" / "custom_template.py"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "_registered", [])
    monkeypatch.setenv("SUMMARY_FOLDER", str(tmp_path))
    return Path(shutil.copy(TEMPLATE, tmp_path / "my_summary.py"))


def find(copy: Path) -> Handler:
    found = {each.name(): each for each in registry.load_handlers([str(copy)]) if isinstance(each, Handler)}
    return found["summary"]


def test_a_copy_delivers(copy: Path, tmp_path: Path) -> None:
    handler, case = find(copy), three_kinds("batch_1")
    assert handler.enabled()
    handler.check()
    for attempt in (1, 2):
        handler.deliver(replace(case, attempt=attempt).delivery())
    assert json.loads((tmp_path / "batch_1.json").read_text()) == {
        "batch_id": "batch_1",
        "version": 1,
        "delivery_key": case.delivery().key,
        "answered": 2,
        "failures": {"400": 1, "batch_expired": 1},
    }
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py") == ["batch_1.json"]


def test_the_doctor_knows_it_and_the_built_in_ones(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDLER_PARQUET_URL", str(tmp_path / "data"))
    monkeypatch.setenv("HANDLER_POSTGRES_DSN", "postgresql://me:not-for-any-log@127.0.0.1:1/x")
    monkeypatch.setenv("HANDLER_S3_URL", "s3:/wrong")
    settings = Settings(vllm_batch_home=tmp_path / "home", postgres_host="", handler_modules=str(copy))
    found = {finding.check: (finding.level, finding.text) for finding in check_handlers(settings)}
    assert found["handler summary"] == found["handler parquet"] == ("ok", "on")
    assert found["handler directory"] == ("ok", "off")
    level, text = found["handler postgres"]
    assert (level, "refused" in text, "not-for-any-log" in text) == ("warn", True, False)
    assert found["handler s3"] == ("warn", "ConfigurationError: 's3:/wrong' is not s3://bucket/prefix")
