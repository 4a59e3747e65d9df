"""`vllm-batch webhooks secret` on a real store."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_batch_dagster.adapters.store import open_store
from vllm_batch_dagster.cli.main import app
from vllm_batch_dagster.core.ports import BatchStore

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("VLLM_BATCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POSTGRES_HOST", "")
    return lambda *arguments: CliRunner().invoke(app, ["webhooks", "secret", *arguments])


@pytest.fixture
def store(run: Run, tmp_path: Path) -> BatchStore:
    run()
    return open_store(f"sqlite:///{tmp_path / 'home' / 'batches.db'}")


def test_the_secret_is_made_once_and_shown_again(run: Run, store: BatchStore) -> None:
    first, second = run(), run()
    assert first.stdout == second.stdout
    assert first.stdout.startswith("whsec_")
    assert store.webhooks.project_secret("default", "whsec_x").current == first.stdout.strip()


def test_each_project_has_its_own(run: Run) -> None:
    assert run("--project", "team-a").stdout != run().stdout


def test_a_rotation_keeps_the_old_secret_for_a_day(run: Run, store: BatchStore) -> None:
    old = run().stdout.strip()
    rotated = run("--rotate")
    secret = store.webhooks.project_secret("default", "whsec_x")
    assert secret.current == rotated.stdout.strip() != old
    assert secret.old == old
    assert "signed with the old secret too" in rotated.stderr


def test_a_rotation_can_end_the_old_secret(run: Run, store: BatchStore) -> None:
    rotated = run("--rotate", "--revoke-old")
    secret = store.webhooks.project_secret("default", "whsec_x")
    assert (secret.current, secret.old) == (rotated.stdout.strip(), None)
    assert rotated.stderr == ""


def test_an_option_without_its_partner_and_a_wrong_project(run: Run) -> None:
    assert run("--revoke-old").exit_code == 2
    assert run("--project", "No Project").exit_code == 1
