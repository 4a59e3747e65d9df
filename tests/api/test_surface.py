"""What holds on every route: the envelope, the request id, unknown routes, crashes, the OpenAPI document."""

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from vllm_batch_dagster.core.errors import EngineUnavailable
from vllm_batch_dagster.core.models import Batch, Model
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchStatus


def read_error(answer: Any) -> dict[str, Any]:
    """The envelope's content; fails when it is not exactly the envelope."""
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    return dict(body["error"])


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v1/nonsense", 404, "Invalid URL (GET /v1/nonsense)"),
        ("GET", "/v1/files/", 404, "Invalid URL (GET /v1/files/)"),
        ("POST", "/v2/files", 404, "Invalid URL (POST /v2/files)"),
        ("PUT", "/v1/files", 405, "Not allowed to PUT on /v1/files."),
        ("DELETE", "/v1/batches/batch_1", 405, "Not allowed to DELETE on /v1/batches/batch_1."),
    ],
)
def test_59_unknown_routes_and_methods(client: TestClient, method: str, path: str, status: int, message: str) -> None:
    answer = client.request(method, path)

    assert answer.status_code == status
    error = read_error(answer)
    assert (error["message"], error["type"]) == (message, "invalid_request_error")
    assert (status == 405) == ("allow" in answer.headers)


def test_59_61_a_crash_is_an_envelope_with_the_request_id(
    client: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(batch_id: str) -> Batch:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(app.state.services.store.batches, "get", crash)
    answer = client.get("/v1/batches/batch_1")

    assert answer.status_code == 500
    error = read_error(answer)
    assert error["type"] == "server_error"
    assert answer.headers["x-request-id"] in error["message"]
    assert "secret" not in error["message"]


@pytest.mark.parametrize("path", ["/", "/health", "/v1/files", "/v1/batches/unknown", "/nonsense"])
def test_61_every_response_has_its_own_request_id(client: TestClient, path: str) -> None:
    answers = [client.get(path) for _ in range(2)]

    assert len({answer.headers["x-request-id"] for answer in answers}) == 2
    assert all(answer.headers["openai-processing-ms"].isdigit() for answer in answers)


def test_62_unknown_headers_are_ignored(client: TestClient) -> None:
    headers = {"authorization": "Bearer anything", "openai-organization": "org-x", "x-stainless-os": "Minix"}
    assert client.get("/v1/batches", headers=headers).status_code == 200


def test_the_status_counts_open_batches_only(client: TestClient, store: BatchStore) -> None:
    for number, status in enumerate((BatchStatus.VALIDATING, BatchStatus.VALIDATING, BatchStatus.COMPLETED)):
        store.batches.add(Batch(f"batch_{number}", "file-1", "/v1/embeddings", "24h", status, 1, 2))

    status = client.get("/").json()
    assert status["open_batches"] == 2
    assert status["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert status["dagster_url"] == "http://127.0.0.1:3000"
    assert client.get(status["docs"]).status_code == 200


def test_health_says_when_the_store_is_away(client: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/health").json()["status"] == "ok"

    def fail(**query: object) -> None:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(app.state.services.store.batches, "list", fail)
    answer = client.get("/health")
    assert answer.status_code == 503
    assert "connection refused" in read_error(answer)["message"]


def test_models_are_503_while_no_engine_of_somebody_else_answers(
    client: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[Model]:
        raise EngineUnavailable("http://gpu:8000 does not answer")

    monkeypatch.setattr(app.state.services.catalog, "all", fail)
    answer = client.get("/v1/models")
    assert answer.status_code == 503
    assert "http://gpu:8000" in read_error(answer)["message"]


def test_the_openapi_document_promises_what_is_kept(client: TestClient) -> None:
    document = client.get("/openapi.json").json()

    statuses = {
        status
        for operations in document["paths"].values()
        for operation in operations.values()
        for status in operation["responses"]
    }
    assert "422" not in statuses
    create = document["paths"]["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert create["required"] == ["input_file_id", "endpoint", "completion_window"]
    assert "multipart/form-data" in document["paths"]["/v1/files"]["post"]["requestBody"]["content"]
