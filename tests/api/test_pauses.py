"""What the API says of a batch that is paused: one more field, and only then."""

from collections.abc import Callable
from typing import Any

import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.core.pauses import ALL, Pause, PauseCause, model_scope
from vllm_batch_dagster.core.ports import BatchStore

Create = Callable[..., dict[str, Any]]
Lead = Callable[[str], str]


def test_a_paused_batch_says_why(client: TestClient, create: Create, store: BatchStore, clock: FixedClock) -> None:
    batch_id, other = create()["id"], create()["id"]
    now = int(clock())
    store.pauses.put(Pause(batch_id, PauseCause.ENGINE, "does not start\n/home/me/engine.log", now, now + 30))
    shown = {"cause": "engine", "reason": "does not start", "since": now, "until": now + 30}
    assert client.get(f"/v1/batches/{batch_id}").json()["paused"] == shown
    listed = {batch["id"]: batch for batch in client.get("/v1/batches").json()["data"]}
    assert listed[batch_id]["paused"] == shown
    assert "paused" not in listed[other]
    clock.advance(30)
    assert "paused" not in client.get(f"/v1/batches/{batch_id}").json()


@pytest.mark.parametrize("status", ["completed", "cancelled", "failed", "expired"])
def test_a_finished_batch_is_not_paused(client: TestClient, lead_to: Lead, store: BatchStore, status: str) -> None:
    batch_id = lead_to(status)
    store.pauses.put(Pause(ALL, PauseCause.OPERATOR, "moving", 1))
    assert "paused" not in client.get(f"/v1/batches/{batch_id}").json()


def test_a_pause_of_another_model_is_not_shown(client: TestClient, create: Create, store: BatchStore) -> None:
    batch_id = create()["id"]
    store.pauses.put(Pause(model_scope("other"), PauseCause.ENGINE, "no", 1))
    assert "paused" not in client.get(f"/v1/batches/{batch_id}").json()


def test_a_strict_client_reads_a_paused_batch(sdk: OpenAI, create: Create, store: BatchStore) -> None:
    batch_id = create()["id"]
    store.pauses.put(Pause(ALL, PauseCause.OPERATOR, "moving", 1))
    batch = sdk.batches.retrieve(batch_id)
    assert batch.status == "validating"
    assert (batch.model_extra or {})["paused"]["reason"] == "moving"
