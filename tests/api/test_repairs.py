"""Repair rounds over HTTP: the metadata that asks for them, and what a batch shows of them."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.test_batches import PARAMS, Create
from vllm_batch_dagster.core.models import RepairCounts
from vllm_batch_dagster.core.ports import BatchStore


@pytest.mark.parametrize(("key", "value"), [("repair_schema", "9"), ("repair_length", "1x")])
def test_a_value_that_means_nothing_is_a_400(client: TestClient, store: BatchStore, key: str, value: str) -> None:
    refused = client.post("/v1/batches", json={**PARAMS, "metadata": {key: value}})
    assert refused.status_code == 400
    error: dict[str, Any] = refused.json()["error"]
    assert (error["param"], error["code"]) == (f"metadata.{key}", "invalid_value")
    assert f"but got '{value}'" in error["message"]


def test_a_batch_shows_its_repairs_when_it_has_ended(client: TestClient, create: Create, store: BatchStore) -> None:
    batch = create(metadata={"repair_schema": "2"})
    assert "repairs" not in batch
    store.batches.amend(batch["id"], repairs=RepairCounts(3, 1, 5, 700))
    shown = client.get(f"/v1/batches/{batch['id']}").json()["repairs"]
    assert shown == {"repaired": 3, "unrepaired": 1, "repeats": 5, "repeat_tokens": 700}
