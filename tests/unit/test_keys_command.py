"""`vllm-batch keys`, and which key the other commands send."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_batch_dagster.cli.api_client import open_client
from vllm_batch_dagster.cli.main import app
from vllm_batch_dagster.composition import build_store
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.keys import hash_secret
from vllm_batch_dagster.settings import Settings, load_settings

Run = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True)
def empty_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new state folder, and no other setting in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in (*Settings.model_fields, "openai_api_key"):
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("VLLM_BATCH_HOME", str(tmp_path / "home"))


@pytest.fixture
def run() -> Run:
    """Run `vllm-batch keys ...`; returns what it printed and what it said beside it."""

    def run(*arguments: str) -> tuple[str, str]:
        result = CliRunner().invoke(app, ["keys", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout.strip(), result.stderr

    return run


def test_a_new_key_is_the_whole_output_and_only_its_hash_is_stored(run: Run) -> None:
    secret, said = run("create", "--project", "team-a", "--label", "ci")
    [key] = build_store(load_settings()).keys.list()

    assert re.fullmatch(r"vb-[\w-]{43}", secret)
    assert (key.project_id, key.label, key.hash) == ("team-a", "ci", hash_secret(secret))
    assert key.id in said
    assert "not shown again" in said
    database = b"".join(path.read_bytes() for path in load_settings().vllm_batch_home.glob("batches.db*"))
    assert secret.encode() not in database
    assert key.hash.encode() in database


def test_the_first_key_says_what_changes(run: Run) -> None:
    assert "from now on every request" in run("create")[1]
    assert "from now on every request" not in run("create")[1]


def test_the_list_shows_every_key_and_no_secret(run: Run) -> None:
    secrets = [run("create", "--project", project)[0] for project in ("team-a", "team-b")]
    listed = json.loads(run("list", "--json")[0])
    assert [(key["project"], key["last_used"], key["revoked"]) for key in listed] == [
        ("team-a", None, None),
        ("team-b", None, None),
    ]
    table = run("list")[0]
    assert all(key["id"] in table and key["project"] in table for key in listed)
    assert not any(secret in table + json.dumps(listed) for secret in secrets)


def test_a_key_is_revoked_once_and_for_good(run: Run) -> None:
    run("create")
    run("create")
    first, second = (key["id"] for key in json.loads(run("list", "--json")[0]))
    assert "No key is left" not in run("revoke", first)[1]
    assert run("revoke", first)[0] == f"{first} of project 'default' is revoked"
    assert "the API stays closed" in run("revoke", second)[1]
    assert all(key["revoked"] for key in json.loads(run("list", "--json")[0]))


def test_a_key_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidInput, match="there is no key key_x: `vllm-batch keys list`"):
        CliRunner().invoke(app, ["keys", "revoke", "key_x"], catch_exceptions=False)


def test_a_wrong_project_is_refused() -> None:
    with pytest.raises(InvalidInput, match="cannot be a project"):
        CliRunner().invoke(app, ["keys", "create", "--project", "Team A"], catch_exceptions=False)
    assert list(build_store(load_settings()).keys.list()) == []


@pytest.mark.parametrize(
    ("environment", "sent"),
    [
        ({}, "none"),
        ({"OPENAI_API_KEY": "theirs"}, "theirs"),
        ({"VLLM_BATCH_API_KEY": "ours"}, "ours"),
        ({"VLLM_BATCH_API_KEY": "ours", "OPENAI_API_KEY": "theirs"}, "ours"),
        ({"VLLM_BATCH_API_KEY": "", "OPENAI_API_KEY": ""}, "none"),
    ],
)
def test_the_key_that_commands_send(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sent: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with open_client(load_settings()) as client:
        assert client.api_key == sent
