"""`vllm-batch pause` and `resume`, the pauses in `status`, and the settings that pause."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from vllm_batch_dagster.cli.main import app, describe_settings_error
from vllm_batch_dagster.composition import build_gpus, build_store
from vllm_batch_dagster.core.errors import InvalidInput, StateConflict
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.pauses import ALL, LATCHED, Pause, PauseCause, model_scope
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.settings import Settings, load_settings

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def empty_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new state folder, and no other setting in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("VLLM_BATCH_HOME", str(tmp_path / "home"))


@pytest.fixture
def run() -> Run:
    """Run `vllm-batch ...` and return what it printed."""

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result.stdout

    return run


@pytest.fixture
def store(run: Run) -> BatchStore:
    run("resume")  # makes the state folder
    store = build_store(load_settings())
    store.batches.add(a_batch("batch_1"))
    return store


def a_batch(batch_id: str) -> Batch:
    now = int(time.time())
    return Batch(
        batch_id, "file-1", "/v1/chat/completions", "24h", BatchStatus.VALIDATING, now, now + 86_400, model="tiny"
    )


def test_everything_is_paused_until_it_is_resumed(run: Run, store: BatchStore) -> None:
    assert "every batch: paused by operator: moving house" in run("pause", "--reason", "moving house")
    (pause,) = store.pauses.list()
    assert (pause.scope, pause.cause, pause.reason, pause.until) == (ALL, PauseCause.OPERATOR, "moving house", None)
    assert "ended: all paused by operator" in run("resume")
    assert list(store.pauses.list()) == []


def test_one_batch_is_paused_for_a_time(run: Run, store: BatchStore) -> None:
    run("pause", "batch_1", "--for", "2h")
    (pause,) = store.pauses.list()
    assert pause.until is not None
    assert (pause.scope, pause.until - pause.since) == ("batch_1", 7200)


def test_a_batch_that_everything_stops_stays_paused(run: Run, store: BatchStore) -> None:
    run("pause")
    run("pause", "batch_1")
    said = run("resume", "batch_1")
    assert "ended: batch_1 paused" in said
    assert "still all paused" in said
    assert [pause.scope for pause in store.pauses.list()] == [ALL]


def test_to_resume_ends_breakers_and_what_is_latched(run: Run, store: BatchStore) -> None:
    store.pauses.put(Pause(model_scope("tiny"), PauseCause.ENGINE, "no such model", 1, mark="abc"))
    store.pauses.put(Pause(model_scope("other"), PauseCause.ENGINE, "no memory", 1))
    run("resume", "batch_1")
    assert [pause.scope for pause in store.pauses.list()] == [model_scope("other")]
    store.pauses.put(Pause(ALL, PauseCause.GPU, "XID 79", 1, mark=LATCHED))
    run("resume")
    assert list(store.pauses.list()) == []


@pytest.mark.parametrize("command", ["pause", "resume"])
def test_a_batch_must_be_there_and_open(run: Run, store: BatchStore, command: str) -> None:
    with pytest.raises(InvalidInput, match="there is no batch batch_9"):
        run(command, "batch_9")
    store.batches.advance("batch_1", BatchEvent.INVALID, 2)
    with pytest.raises(StateConflict, match="batch_1 is failed"):
        run(command, "batch_1")


@pytest.mark.parametrize("length", ["2", "forever", "0h", "31d"])
def test_a_length_of_time_must_be_one(run: Run, store: BatchStore, length: str) -> None:
    with pytest.raises(InvalidInput, match="is no length of time"):
        run("pause", "--for", length)
    assert list(store.pauses.list()) == []


def test_status_shows_what_holds(run: Run, store: BatchStore) -> None:
    run("pause", "--reason", "moving [house]")
    store.pauses.put(Pause("batch_1", PauseCause.OPERATOR, "over", 1, 2))
    pauses = json.loads(run("status", "--json", code=3))["pauses"]
    assert [(pause["scope"], pause["cause"], pause["reason"]) for pause in pauses] == [
        ("all", "operator", "moving [house]")
    ]
    assert "all paused by operator: moving [house]" in run("status", code=3)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DISPATCH_HOURS", "10 to 12", "DISPATCH_HOURS: .*'10 to 12' is no range of hours: write ranges like"),
        ("DISPATCH_TIME_ZONE", "Berlin", "DISPATCH_TIME_ZONE: .*'Berlin' is no time zone"),
        ("GPU_RESUME_CELSIUS", "90", r"GPU_RESUME_CELSIUS \(90\) must be below GPU_PAUSE_CELSIUS \(88\)"),
        ("GPU_PAUSE_OTHER_MEMORY", "0.1", r"GPU_RESUME_OTHER_MEMORY \(0.16\) must be below GPU_PAUSE_OTHER_MEMORY"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        load_settings()
    assert re.search(words, describe_settings_error(caught.value))


@pytest.mark.parametrize(
    ("changes", "has_gate"),
    [
        ({"engine_device": "cuda"}, True),
        ({"engine_device": "cpu"}, False),
        ({"engine_device": "cuda", "gpu_gate": False}, False),
        ({"engine_device": "cuda", "engine_url": "http://box:8000"}, False),
    ],
)
def test_who_has_a_gate(tmp_path: Path, changes: dict[str, object], has_gate: bool) -> None:
    assert (build_gpus(Settings(vllm_batch_home=tmp_path, **changes)) is not None) is has_gate
