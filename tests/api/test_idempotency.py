"""Idempotency-Key: a call that is sent again makes nothing twice, and is told so."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from openai import ConflictError, OpenAI
from starlette.testclient import TestClient

from tests.api.conftest import PATIENCE_SECONDS
from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.core.claims import CLAIM_SECONDS
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.ports import BatchStore

ONCE = {"Idempotency-Key": "once"}
PARAMS = {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"}
CALLS = 6


def send_file(client: TestClient, content: bytes = b"{}\n", headers: dict[str, str] = ONCE, **fields: str) -> Any:
    form = {"purpose": "batch", **fields}
    return client.post("/v1/files", data=form, files={"file": ("in.jsonl", content)}, headers=headers)


def send_batch(client: TestClient, headers: dict[str, str] = ONCE, **params: object) -> Any:
    return client.post("/v1/batches", json={**PARAMS, **params}, headers=headers)


def count(client: TestClient, path: str, headers: dict[str, str] | None = None) -> int:
    return len(client.get(path, headers=headers or {}).json()["data"])


def read_conflict(answer: Any) -> dict[str, Any]:
    """The envelope of a 409; fails for anything else."""
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    error = dict(answer.json()["error"])
    assert (error["param"], error["code"]) == ("Idempotency-Key", "idempotency_key_reused")
    return error


@pytest.mark.parametrize(("send", "path"), [(send_file, "/v1/files"), (send_batch, "/v1/batches")])
def test_64_the_same_call_makes_one_object(client: TestClient, send: Callable[..., Any], path: str) -> None:
    first, second = send(client), send(client)
    assert (first.status_code, second.status_code) == (200, 200)
    assert second.json() == first.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert count(client, path) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"content": b"{} \n"},
        {"purpose": "evals"},
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
    ],
)
def test_64_another_file_with_the_same_key_is_a_conflict(
    client: TestClient, stored_files: Callable[[], int], change: dict[str, Any]
) -> None:
    assert send_file(client).status_code == 200
    assert "another body" in read_conflict(send_file(client, **change))["message"]
    assert (count(client, "/v1/files"), stored_files()) == (1, 1)


def test_64_another_batch_with_the_same_key_is_a_conflict(client: TestClient) -> None:
    assert send_batch(client).status_code == 200
    read_conflict(send_batch(client, metadata={"a": "1"}))
    assert count(client, "/v1/batches") == 1


def test_64_a_repeated_upload_leaves_one_copy_on_disk(client: TestClient, stored_files: Callable[[], int]) -> None:
    for _ in range(3):
        assert send_file(client, b"x" * 100_000).status_code == 200
    assert stored_files() == 1


def test_64_a_batch_is_returned_as_it_is_now(client: TestClient) -> None:
    batch_id = send_batch(client).json()["id"]
    client.post(f"/v1/batches/{batch_id}/cancel")
    assert send_batch(client).json()["status"] == "cancelling"


def test_64_files_and_batches_may_share_a_key(client: TestClient) -> None:
    assert send_file(client).status_code == send_batch(client).status_code == 200


def test_64_without_a_key_every_call_makes_its_own(client: TestClient) -> None:
    for send in (send_file, send_batch):
        assert send(client, headers={}).json()["id"] != send(client, headers={}).json()["id"]


@pytest.mark.parametrize("send", [send_file, send_batch])
def test_64_a_key_is_kept_for_a_day(client: TestClient, clock: FixedClock, send: Callable[..., Any]) -> None:
    first = send(client).json()["id"]
    clock.advance(CLAIM_SECONDS - 1)
    assert send(client).json()["id"] == first
    clock.advance(1)
    assert send(client).json()["id"] != first


def test_64_a_call_that_failed_is_not_remembered(
    client: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert send_batch(client, endpoint="/v1/nonsense").status_code == 400
    assert send_file(client, purpose="nonsense").status_code == 400

    def refuse(*_: object, **__: object) -> str:
        raise StorageFailure("the database is read-only")

    with monkeypatch.context() as broken:
        broken.setattr(app.state.services.store.batches, "add", refuse)
        broken.setattr(app.state.services.store.files, "add", refuse)
        assert send_batch(client).status_code == send_file(client).status_code == 500
    for send in (send_file, send_batch):
        answer = send(client)
        assert answer.status_code == 200
        assert "idempotent-replayed" not in answer.headers


def test_64_a_deleted_file_is_made_anew(client: TestClient) -> None:
    first = send_file(client).json()["id"]
    client.delete(f"/v1/files/{first}")
    again = send_file(client)
    assert again.json()["id"] != first
    assert "idempotent-replayed" not in again.headers


@pytest.mark.parametrize("send", [send_file, send_batch])
@pytest.mark.parametrize("value", ["", "x" * 256, "a\tb"])
def test_64_a_wrong_key_is_refused(client: TestClient, send: Callable[..., Any], value: str) -> None:
    answer = send(client, headers={"Idempotency-Key": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Idempotency-Key"


def test_64_projects_do_not_share_keys(client: TestClient, new_key: Callable[..., str]) -> None:
    made, secrets = set(), [new_key(project) for project in ("team-a", "team-b")]
    for secret in secrets:
        headers = {**ONCE, "authorization": f"Bearer {secret}"}
        made |= {send_file(client, headers=headers).json()["id"], send_batch(client, headers=headers).json()["id"]}
        assert (count(client, "/v1/files", headers), count(client, "/v1/batches", headers)) == (1, 1)
    assert len(made) == 4


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
def test_64_of_calls_at_once_one_makes_the_object(base_url: str, stored_files: Callable[[], int], path: str) -> None:
    def call(_: int) -> Any:
        body: Any = {"json": PARAMS}
        if path == "/v1/files":
            body = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", b"x" * 500_000)}}
        return httpx2.post(base_url + path, headers=ONCE, timeout=PATIENCE_SECONDS, **body)

    with ThreadPoolExecutor(CALLS) as pool:
        answers = list(pool.map(call, range(CALLS)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert len(httpx2.get(base_url + path, timeout=PATIENCE_SECONDS).json()["data"]) == 1
    assert stored_files() == (1 if path == "/v1/files" else 0)


class LosingTransport(httpx2.HTTPTransport):
    """Loses the first answer of every path, after the server has done its work."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: set[str] = set()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        answer = super().handle_request(request)
        if request.url.path not in self.lost:
            self.lost.add(request.url.path)
            answer.close()
            raise httpx2.ReadError("the connection broke", request=request)
        return answer


def test_64_the_sdk_sends_a_call_again_whose_answer_was_lost(base_url: str, store: BatchStore) -> None:
    transport = LosingTransport()
    with OpenAI(base_url=f"{base_url}/v1", api_key="any", http_client=httpx2.Client(transport=transport)) as sdk:
        file = sdk.files.create(file=b"{}\n", purpose="batch", extra_headers=ONCE)
        batch = sdk.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", extra_headers=ONCE
        )
    assert len(transport.lost) == 2
    assert [item.id for item in store.files.list().data] == [file.id]
    assert [item.id for item in store.batches.list().data] == [batch.id]


def test_64_the_sdk_does_not_repeat_a_conflict(base_url: str) -> None:
    calls: list[str] = []
    transport = httpx2.Client(event_hooks={"request": [lambda request: calls.append(str(request.url))]})
    with OpenAI(base_url=f"{base_url}/v1", api_key="any", http_client=transport) as sdk:
        sdk.files.create(file=b"{}\n", purpose="batch", extra_headers=ONCE)
        with pytest.raises(ConflictError):
            sdk.files.create(file=b"[]\n", purpose="batch", extra_headers=ONCE)
    assert len(calls) == 2


UPLOAD = {"filename": "in.jsonl", "purpose": "batch", "bytes": 3, "mime_type": "application/jsonl"}


def test_64_the_same_upload_is_made_once(client: TestClient) -> None:
    first = client.post("/v1/uploads", json=UPLOAD, headers=ONCE)
    second = client.post("/v1/uploads", json=UPLOAD, headers=ONCE)
    assert (first.status_code, second.status_code) == (200, 200)
    assert second.json() == first.json()
    assert ("idempotent-replayed" in first.headers, second.headers["idempotent-replayed"]) == (False, "true")
    read_conflict(client.post("/v1/uploads", json=UPLOAD | {"bytes": 4}, headers=ONCE))
    assert client.post("/v1/uploads", json=UPLOAD).json()["id"] != first.json()["id"]


def test_64_a_completion_sent_again_is_told_so_and_its_key_is_for_nothing_else(client: TestClient) -> None:
    def begin() -> tuple[str, str]:
        path = f"/v1/uploads/{client.post('/v1/uploads', json=UPLOAD).json()['id']}"
        return path, client.post(f"{path}/parts", files={"data": b"{}\n"}).json()["id"]

    (path, part), (other, other_part) = begin(), begin()
    first, second = (client.post(f"{path}/complete", json={"part_ids": [part]}, headers=ONCE) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200)
    assert second.json() == first.json()
    assert ("idempotent-replayed" in first.headers, second.headers["idempotent-replayed"]) == (False, "true")
    read_conflict(client.post(f"{path}/complete", json={"part_ids": [part], "md5": "0" * 32}, headers=ONCE))
    read_conflict(client.post(f"{other}/complete", json={"part_ids": [other_part]}, headers=ONCE))
    assert client.post(f"{other}/complete", json={"part_ids": [other_part]}).status_code == 200
    assert count(client, "/v1/files") == 2
