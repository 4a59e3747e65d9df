"""The routes of one upload, for the tests of uploads in parts."""

from typing import Any

from starlette.testclient import TestClient

Answer = Any
PARAMS = {"filename": "in.jsonl", "purpose": "batch", "bytes": 9, "mime_type": "application/jsonl"}


class Parts:
    """The routes of one upload."""

    def __init__(self, client: TestClient, **params: object) -> None:
        self.client = client
        answer = client.post("/v1/uploads", json={**PARAMS, **params})
        assert answer.status_code == 200, answer.text
        self.created: dict[str, Any] = answer.json()
        self.url = f"/v1/uploads/{self.created['id']}"

    def send(self, data: bytes, name: str = "data") -> Answer:
        return self.client.post(f"{self.url}/parts", files={name: ("upload", data, "application/octet-stream")})

    def add(self, data: bytes) -> str:
        answer = self.send(data)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def complete(self, *part_ids: str, **params: object) -> Answer:
        return self.client.post(f"{self.url}/complete", json={"part_ids": part_ids, **params})

    def cancel(self) -> Answer:
        return self.client.post(f"{self.url}/cancel", headers={"content-type": "application/json"})


def read_error(answer: Answer, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])
