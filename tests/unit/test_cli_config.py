"""`vllm-batch config`: values with their source, masked secrets, and the generated page of the documentation."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_batch_dagster.cli.config import MASK, describe_settings, render_markdown
from vllm_batch_dagster.cli.main import app
from vllm_batch_dagster.settings import PROJECT_ROOT, Settings, load_settings


@pytest.fixture(autouse=True)
def empty_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory without `.env`, and no setting in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_the_page_of_the_documentation_is_current() -> None:
    page = (PROJECT_ROOT / "docs" / "configuration.md").read_text()
    assert page == render_markdown(), "run: vllm-batch config --markdown > docs/configuration.md"


def test_the_page_names_every_setting_and_no_place_of_this_machine() -> None:
    page = render_markdown()
    assert all(f"| `{name.upper()}` |" in page for name in Settings.model_fields)
    assert str(PROJECT_ROOT) not in page
    assert str(Path.cwd()) not in page


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_source_of_a_value_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("CHUNK_SIZE=7\napi_port=4081\n")
    monkeypatch.setenv("CHUNK_SIZE", "9")
    found = {setting.name: (setting.value, setting.source) for setting in describe_settings(load_settings())}
    assert found["CHUNK_SIZE"] == ("9", "environment")
    assert found["API_PORT"] == ("4081", ".env")
    assert found["DAGSTER_PORT"] == ("3000", "default")


def test_secrets_are_masked_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "hunter2")
    runner = CliRunner()
    plain = runner.invoke(app, ["config"]).output
    structured = runner.invoke(app, ["config", "--json"]).output
    assert "hunter2" not in plain + structured
    values = {setting["name"]: setting["value"] for setting in json.loads(structured)}
    assert values["POSTGRES_PASSWORD"] == MASK
    assert values["ENGINE_API_KEY"] == ""


def test_the_table_shows_every_setting() -> None:
    output = CliRunner().invoke(app, ["config"]).output
    assert all(name.upper() in output for name in Settings.model_fields)


def test_the_markdown_of_the_command_is_the_page() -> None:
    assert CliRunner().invoke(app, ["config", "--markdown"]).output == render_markdown()
