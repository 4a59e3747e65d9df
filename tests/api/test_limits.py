"""What a project may use: requests per minute, stored bytes, queued lines."""

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from openai import OpenAI, PermissionDeniedError
from starlette.testclient import TestClient

from tests.api.conftest import PATIENCE_SECONDS
from vllm_batch_dagster.adapters.local_files import LocalWorkspace
from vllm_batch_dagster.adapters.memory import FixedClock, MemoryCatalog
from vllm_batch_dagster.core.models import Batch, Model
from vllm_batch_dagster.core.ports import BatchStore, FileStore
from vllm_batch_dagster.core.states import BatchEvent
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages.validation import ValidationLimits, validate_batch


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


class TestRequestsPerMinute:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_requests_per_minute": 3})

    def test_63_one_too_many_is_told_when_to_come_back(self, client: TestClient, clock: FixedClock) -> None:
        assert [client.get("/v1/files").status_code for _ in range(3)] == [200, 200, 200]
        refused = client.get("/v1/files")

        assert (refused.status_code, refused.headers["retry-after"]) == (429, "20")
        error = refused.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("requests", None, "rate_limit_exceeded")
        assert error["message"].startswith("Rate limit reached for project 'default'")
        assert refused.headers["x-request-id"].startswith("req_")

        clock.advance(20)
        assert [client.get("/v1/files").status_code for _ in range(2)] == [200, 429]

    def test_projects_are_counted_apart_and_their_keys_together(
        self, client: TestClient, new_key: Callable[..., str]
    ) -> None:
        one, same, other = (bearer(new_key(project)) for project in ("a", "a", "b"))
        statuses = [client.get("/v1/files", headers=headers).status_code for headers in (one, same, one, same, other)]
        assert statuses == [200, 200, 200, 429, 200]

    def test_strangers_and_supervisors_use_nothing_up(self, client: TestClient, new_key: Callable[..., str]) -> None:
        secret = new_key()
        assert {client.get("/v1/files").status_code for _ in range(5)} == {401}
        assert {client.get("/health").status_code for _ in range(5)} == {200}
        assert client.get("/v1/files", headers=bearer(secret)).status_code == 200

    def test_63_the_sdk_waits_and_succeeds(self, base_url: str, clock: FixedClock) -> None:
        statuses: list[int] = []

        def note(answer: httpx2.Response) -> None:
            statuses.append(answer.status_code)
            clock.advance(float(answer.headers.get("retry-after", 0)))  # the server's clock is not the real one
            if "retry-after" in answer.headers:
                answer.headers["retry-after"] = "0.01"

        for _ in range(3):
            assert httpx2.get(f"{base_url}/v1/files", timeout=PATIENCE_SECONDS).status_code == 200
        transport = httpx2.Client(event_hooks={"response": [note]})
        with OpenAI(base_url=f"{base_url}/v1", api_key="any", http_client=transport) as sdk:
            assert sdk.batches.list().data == []
        assert statuses == [429, 200]


def test_without_a_limit_nobody_is_counted(client: TestClient) -> None:
    assert {client.get("/v1/files").status_code for _ in range(50)} == {200}


class TestStoredBytes:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_stored_bytes": 100})

    def send(self, client: TestClient, size: int, headers: dict[str, str] | None = None) -> Any:
        files = {"file": ("in.jsonl", b"x" * size)}
        return client.post("/v1/files", data={"purpose": "batch"}, files=files, headers=headers or {})

    def test_a_file_that_does_not_fit_is_refused(self, client: TestClient, stored_files: Callable[[], int]) -> None:
        kept = self.send(client, 60).json()["id"]
        refused = self.send(client, 41)

        assert refused.status_code == 403
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == ("file", "storage_limit_exceeded")
        assert "Delete files that are no longer needed" in error["message"]
        assert stored_files() == 1
        assert self.send(client, 40).status_code == 200
        client.delete(f"/v1/files/{kept}")
        assert self.send(client, 60).status_code == 200

    def test_projects_have_rooms_of_their_own(self, client: TestClient, new_key: Callable[..., str]) -> None:
        one, other = bearer(new_key("a")), bearer(new_key("b"))
        assert [self.send(client, 100, headers).status_code for headers in (one, one, other)] == [200, 403, 200]

    def test_a_file_that_has_expired_takes_no_room(self, client: TestClient, clock: FixedClock) -> None:
        assert self.send(client, 100).status_code == 200
        clock.advance(30 * 86_400)
        assert self.send(client, 100).status_code == 200

    def test_a_repetition_needs_no_room(self, client: TestClient) -> None:
        once = {"Idempotency-Key": "once"}
        first, again = self.send(client, 100, once), self.send(client, 100, once)
        assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])

    def test_an_upload_in_parts_that_does_not_fit_is_refused_at_once(self, client: TestClient) -> None:
        params = {"filename": "in.jsonl", "purpose": "batch", "bytes": 101, "mime_type": "application/jsonl"}
        assert client.post("/v1/uploads", json=params).status_code == 403
        assert client.post("/v1/uploads", json=params | {"bytes": 100}).status_code == 200

    def test_parts_take_room_until_their_upload_is_closed(self, client: TestClient) -> None:
        params = {"filename": "in.jsonl", "purpose": "batch", "bytes": 60, "mime_type": "application/jsonl"}
        path = f"/v1/uploads/{client.post('/v1/uploads', json=params).json()['id']}"
        part = client.post(f"{path}/parts", files={"data": b"x" * 60})
        assert self.send(client, 41).status_code == 403
        assert client.post("/v1/uploads", json=params).status_code == 403
        assert client.post(f"{path}/parts", files={"data": b"x" * 41}).status_code == 403

        assert client.post(f"{path}/complete", json={"part_ids": [part.json()["id"]]}).status_code == 200
        assert self.send(client, 41).status_code == 403
        assert self.send(client, 40).status_code == 200

    def test_a_cancelled_upload_gives_its_room_back(self, client: TestClient) -> None:
        params = {"filename": "in.jsonl", "purpose": "batch", "bytes": 90, "mime_type": "application/jsonl"}
        path = f"/v1/uploads/{client.post('/v1/uploads', json=params).json()['id']}"
        assert client.post(f"{path}/parts", files={"data": b"x" * 90}).status_code == 200
        assert self.send(client, 90).status_code == 403
        client.post(f"{path}/cancel")
        assert self.send(client, 90).status_code == 200

    def test_the_sdk_sends_it_once(self, base_url: str) -> None:
        calls: list[str] = []
        transport = httpx2.Client(event_hooks={"request": [lambda request: calls.append(str(request.url))]})
        sdk = OpenAI(base_url=f"{base_url}/v1", api_key="any", http_client=transport)
        with sdk, pytest.raises(PermissionDeniedError):
            sdk.files.create(file=b"x" * 101, purpose="batch")
        assert len(calls) == 1


class Queue:
    """Batches of some lines each, validated as the graph does, at most ten lines a project."""

    def __init__(self, client: TestClient, store: BatchStore, files: FileStore, settings: Settings) -> None:
        self._client, self.store, self._files = client, store, files
        self._workspace = LocalWorkspace(settings.batches_folder, settings.datasets_folder)

    def submit(self, lines: int, headers: dict[str, str] | None = None) -> Batch:
        body = {"model": "tiny", "input": "x"}
        rows = [
            json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/embeddings", "body": body})
            for number in range(lines)
        ]
        form = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", "\n".join(rows).encode())}}
        file_id = self._client.post("/v1/files", **form, headers=headers or {}).json()["id"]
        params = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        batch_id = self._client.post("/v1/batches", json=params, headers=headers or {}).json()["id"]
        self.validate(batch_id)
        return self.store.batches.get(batch_id)

    def validate(self, batch_id: str) -> None:
        batch, limits = self.store.batches.get(batch_id), ValidationLimits(100, 10, max_queued_lines=10)
        catalog = MemoryCatalog([Model(name="tiny", path="models/tiny")])
        validate_batch(batch, self.store, self._files, self._workspace, catalog, limits, FixedClock())

    def finish(self, batch_id: str) -> None:
        for event in (BatchEvent.MERGE, BatchEvent.PUBLISHED):
            self.store.batches.advance(batch_id, event, 2_000_000_000)


@pytest.fixture
def queue(client: TestClient, store: BatchStore, files: FileStore, settings: Settings) -> Queue:
    return Queue(client, store, files, settings)


def test_a_batch_over_the_queue_fails_before_it_costs_anything(queue: Queue, client: TestClient) -> None:
    assert queue.submit(6).status == "in_progress"
    refused = queue.submit(5)

    shown = client.get(f"/v1/batches/{refused.id}").json()
    assert shown["status"] == "failed"
    assert shown["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    [error] = shown["errors"]["data"]
    assert (error["code"], error["line"], error["param"]) == ("request_limit_exceeded", None, None)
    assert "Limit: 10 enqueued requests, of which 6 are taken; this batch has 5" in error["message"]
    assert queue.store.chunks.list(refused.id) in ((), [])
    assert queue.submit(4).status == "in_progress"


def test_lines_leave_the_queue_with_their_batch(queue: Queue) -> None:
    first = queue.submit(10)
    assert queue.submit(1).status == "failed"
    queue.finish(first.id)
    assert queue.submit(10).status == "in_progress"


def test_validating_a_running_batch_again_does_not_count_it_twice(queue: Queue) -> None:
    batch = queue.submit(10)
    queue.validate(batch.id)
    assert queue.store.batches.get(batch.id).status == "in_progress"


def test_queues_of_projects_are_apart(queue: Queue, new_key: Callable[..., str]) -> None:
    one, other = bearer(new_key("a")), bearer(new_key("b"))
    statuses = [queue.submit(10, headers).status for headers in (one, other, one)]
    assert statuses == ["in_progress", "in_progress", "failed"]
