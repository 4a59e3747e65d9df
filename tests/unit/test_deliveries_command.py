"""`vllm-batch deliveries`, and the handlers in `vllm-batch doctor`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from handlers import registry
from tests.unit.test_handlers import Noting
from vllm_batch_dagster.cli.handler_checkup import check_handlers
from vllm_batch_dagster.cli.main import app
from vllm_batch_dagster.composition import build_store
from vllm_batch_dagster.core.deliveries import DeliveryRecord, DeliveryState, claim, new_delivery, settle
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.core.webhooks import Outcome
from vllm_batch_dagster.settings import Settings, load_settings

Run = Callable[..., str]
NOW = 1_800_000_000
OUTCOMES = {
    "webhook:metadata": Outcome(True, 204),
    "handler:slow": Outcome(False, reason="a long [red]reason[/red] " + "x" * 90),
    "handler:gone": Outcome(False, reason="deleted", is_final=True),
}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BatchStore:
    """A store with a batch that has ended: one delivery is done, one waits, one is dead."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("VLLM_BATCH_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    store = build_store(load_settings())
    store.batches.add(Batch("batch_1", "file-1", "/v1/embeddings", "24h", BatchStatus.CANCELLING, NOW, NOW + 9))
    store.batches.advance("batch_1", BatchEvent.STOPPED, NOW)
    event_id = store.events("batch_1")[0].id
    rows = [new_delivery("batch_1", event_id, target, NOW, version=0) for target in OUTCOMES]
    store.deliveries.plan(event_id, 0, rows)
    for row, outcome in zip(rows, OUTCOMES.values(), strict=True):
        assert store.deliveries.change(row, settle(claim(row, "run", NOW), outcome, NOW))
    return store


@pytest.fixture
def run() -> Run:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["deliveries", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def kept(store: BatchStore, target: str) -> DeliveryRecord:
    return next(each for each in store.deliveries.of_batch("batch_1") if each.target == target)


def targets(run: Run, *arguments: str) -> set[str]:
    return {each["target"] for each in json.loads(run("list", "--json", *arguments))}


def test_what_is_not_delivered_is_shown_unless_more_is_asked_for(run: Run) -> None:
    assert targets(run) == {"handler:slow", "handler:gone"}
    assert targets(run, "--all") == targets(run, "--batch", "batch_1") == set(OUTCOMES)
    assert targets(run, "--project", "other") == set()
    assert len(targets(run, "--limit", "1")) == 1


def test_the_fields(run: Run, store: BatchStore) -> None:
    shown: dict[str, Any] = {each["target"]: each for each in json.loads(run("list", "--all", "--json"))}
    dead = shown["handler:gone"]
    assert dead == {
        "id": kept(store, "handler:gone").id,
        "batch": "batch_1",
        "target": "handler:gone",
        "state": "dead",
        "attempts": 1,
        "next_attempt": None,
        "delivered": None,
        "last_error": "deleted",
        "project": "default",
        "results_version": 0,
    }
    assert shown["webhook:metadata"]["delivered"] == "2027-01-15T08:00:00Z"
    assert shown["handler:slow"]["next_attempt"] > "2027-01-15T08:00:00Z"


def test_the_table_shows_what_others_said_as_it_is(run: Run, store: BatchStore) -> None:
    table = run("list")
    assert "a long [red]reason[/red]" in table
    assert "…" in table
    assert kept(store, "handler:gone").id in table


def test_replay_of_one(run: Run, store: BatchStore) -> None:
    done = kept(store, "webhook:metadata")
    assert "webhook:metadata is due now" in run("replay", done.id)
    assert kept(store, "webhook:metadata").state is DeliveryState.PENDING
    assert kept(store, "webhook:metadata").id == done.id
    assert store.deliveries.due(kept(store, "webhook:metadata").next_attempt_at, 9) == ["batch_1"]


def test_replay_of_a_batch_takes_the_dead_ones(run: Run, store: BatchStore) -> None:
    assert [each["target"] for each in json.loads(run("replay", "batch_1", "--json"))] == ["handler:gone"]
    assert kept(store, "handler:gone").state is DeliveryState.PENDING
    assert kept(store, "webhook:metadata").state is DeliveryState.DELIVERED
    assert "no delivery of batch_1 is dead" in run("replay", "batch_1")


@pytest.mark.parametrize("unknown", ["dlv_1", "batch_2"])
def test_what_does_not_exist(run: Run, unknown: str) -> None:
    with pytest.raises(InvalidInput, match=unknown):
        run("replay", unknown)


def test_doctor_shows_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(Noting):
        def check(self) -> None:
            raise ConnectionError("nobody listens")

    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    monkeypatch.setattr(registry, "_registered", [Noting("good"), Away("away"), Noting("off", enabled=False)])
    settings = load_settings().model_copy(
        update={"handler_modules": "no_such_module", "handlers": "good, away, off, other"}
    )
    found = {finding.check: (finding.level, finding.text) for finding in check_handlers(settings)}
    assert found["handler good"] == ("ok", "on")
    assert found["handler away"] == ("warn", "ConnectionError: nobody listens")
    assert found["handler off"] == ("ok", "off")
    assert found["handler other"][0] == found["handler no_such_module"][0] == "warn"
