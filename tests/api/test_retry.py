"""POST /v1/batches/{id}/retry over HTTP, through the SDK and through the command line."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Batch
from starlette.testclient import TestClient

from api_shim.app import create_app
from tests.unit.conftest import Rig, answer, request_line, request_lines
from vllm_batch_dagster.adapters.memory import FixedClock, MemoryCatalog
from vllm_batch_dagster.core.ports import BatchStore, FileStore
from vllm_batch_dagster.settings import Settings


@pytest.fixture
def ended(rig: Rig) -> str:
    """A completed batch of four lines, of which 1 and 3 failed."""
    batch_id = rig.start(4)
    attempt = rig.begin(batch_id)
    for line in list(attempt.pending_lines()):
        answer(line, ok=line.line % 2 == 0)
    attempt.publish()
    attempt.close()
    rig.merge(batch_id)
    return batch_id


def test_a_retry_is_a_batch_of_the_failed_lines(client: TestClient, rig: Rig, ended: str) -> None:
    answer = client.post(f"/v1/batches/{ended}/retry")
    assert answer.status_code == 200
    made = answer.json()
    assert (made["status"], made["metadata"], made["endpoint"]) == (
        "validating",
        {"retry_of": ended},
        "/v1/chat/completions",
    )
    assert client.get(f"/v1/batches/{made['id']}").json() == made
    content = client.get(f"/v1/files/{made['input_file_id']}/content").content
    assert content == request_line("id-1") + request_line("id-3")
    assert client.get(f"/v1/files/{made['input_file_id']}").json()["filename"] == f"{ended}_retry.jsonl"


def test_the_body_may_give_window_and_metadata(client: TestClient, ended: str) -> None:
    made = client.post(f"/v1/batches/{ended}/retry", json={"completion_window": "2h", "metadata": {"a": "b"}}).json()
    assert (made["completion_window"], made["metadata"]) == ("2h", {"a": "b", "retry_of": ended})


@pytest.mark.parametrize(
    ("body", "param"), [({"completion_window": "soon"}, "completion_window"), ({"metadata": 7}, "metadata")]
)
def test_wrong_parameters_are_refused(client: TestClient, ended: str, body: dict[str, Any], param: str) -> None:
    answer = client.post(f"/v1/batches/{ended}/retry", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [(b"[]", "application/json", 400), (b"{}", "text/plain", 415), (b"{", "application/json", 400)],
)
def test_wrong_bodies_are_refused(client: TestClient, ended: str, content: bytes, kind: str, status: int) -> None:
    answer = client.post(f"/v1/batches/{ended}/retry", content=content, headers={"content-type": kind})
    assert answer.status_code == status


def test_the_states_that_cannot_be_retried(client: TestClient, rig: Rig, lead_to: Callable[[str], str]) -> None:
    running = client.post(f"/v1/batches/{lead_to('in_progress')}/retry")
    assert (running.status_code, running.headers["x-should-retry"]) == (409, "false")
    failed = client.post(f"/v1/batches/{lead_to('failed')}/retry")
    assert (failed.status_code, failed.json()["error"]["code"]) == (400, "nothing_to_retry")
    assert client.post("/v1/batches/batch_x/retry").status_code == 404


def test_a_lost_input_says_so(client: TestClient, rig: Rig, ended: str) -> None:
    input_file = rig.batch(ended).input_file_id
    assert client.delete(f"/v1/files/{input_file}").status_code == 200
    answer = client.post(f"/v1/batches/{ended}/retry")
    assert answer.status_code == 404
    assert (answer.json()["error"]["code"], input_file in answer.json()["error"]["message"]) == (
        "input_file_gone",
        True,
    )
    rig.store.batches.amend(ended, purged_at=int(rig.clock()))
    assert client.post(f"/v1/batches/{ended}/retry").json()["error"]["code"] == "input_file_gone"


def test_the_same_idempotency_key_makes_one_batch(
    client: TestClient, ended: str, stored_files: Callable[[], int]
) -> None:
    first, again = (client.post(f"/v1/batches/{ended}/retry", headers={"idempotency-key": "once"}) for _ in range(2))
    files = stored_files()
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert (
        client.post(
            f"/v1/batches/{ended}/retry", json={"metadata": {}}, headers={"idempotency-key": "once"}
        ).status_code
        == 409
    )
    assert stored_files() == files


def test_the_client_and_the_command_line_retry(sdk: OpenAI, base_url: str, ended: str) -> None:
    made = sdk.post(f"/batches/{ended}/retry", cast_to=Batch)
    assert made.metadata == {"retry_of": ended}

    command = [sys.executable, "-m", "vllm_batch_dagster.cli", "retry", ended, "--window", "3h", "--metadata", "a=b"]
    environment = {**os.environ, "API_PORT": base_url.rpartition(":")[2]}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    batch = sdk.batches.retrieve(shown.stdout.strip())
    assert (batch.completion_window, batch.metadata) == ("3h", {"a": "b", "retry_of": ended})


def test_a_retry_counts_as_stored_bytes(
    settings: Settings, store: BatchStore, files: FileStore, clock: FixedClock, rig: Rig
) -> None:
    batch_id = rig.create(rig.upload(request_lines(3)))
    small = settings.model_copy(update={"max_stored_bytes": 10})
    app = create_app(small, store, files, rig.workspace, MemoryCatalog([]), clock)
    with TestClient(app) as client:
        client.post(f"/v1/batches/{batch_id}/cancel")
        rig.merge(batch_id)
        answer = client.post(f"/v1/batches/{batch_id}/retry")
    assert answer.status_code == 403
    assert rig.store.files.list().has_more is False
