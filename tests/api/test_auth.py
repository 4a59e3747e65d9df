"""Keys at the door of the API: who gets in, what a stranger is told, how long a key is remembered."""

import secrets
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from openai import AuthenticationError, OpenAI
from starlette.testclient import TestClient

from api_shim.auth import FRESH_SECONDS, USE_SECONDS, KeyRing
from tests.api.conftest import wait_for
from vllm_batch_dagster.adapters.memory import FixedClock, MemoryStore
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.keys import make_key, new_secret
from vllm_batch_dagster.core.models import DEFAULT_PROJECT
from vllm_batch_dagster.core.ports import BatchStore


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def read_refusal(answer: Any) -> dict[str, Any]:
    """The envelope of a 401; fails for anything else."""
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"].startswith("req_")
    error = dict(answer.json()["error"])
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    return error


def test_without_keys_everybody_is_served(client: TestClient) -> None:
    assert client.get("/v1/files").status_code == 200
    assert client.get("/v1/files", headers=bearer("anything")).status_code == 200


def test_60_a_key_opens_every_route(client: TestClient, new_key: Callable[..., str]) -> None:
    secret = new_key()
    for path in ("/v1/files", "/v1/batches", "/v1/models"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers=bearer(secret)).status_code == 200


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Bearer a b", "vb-secret"])
def test_60_a_request_without_a_bearer_key(client: TestClient, new_key: Callable[..., str], header: str | None) -> None:
    new_key()
    error = read_refusal(client.get("/v1/files", headers={} if header is None else {"authorization": header}))
    assert error["code"] is None
    assert error["message"].startswith("You didn't provide an API key. You need to provide your API key in an ")


def test_60_two_keys_at_once_are_none(client: TestClient, new_key: Callable[..., str]) -> None:
    headers = [("authorization", f"Bearer {new_key()}"), ("authorization", "Bearer other")]
    assert read_refusal(client.get("/v1/files", headers=headers))["code"] is None


def test_60_a_wrong_key_is_shown_by_its_first_characters(client: TestClient, new_key: Callable[..., str]) -> None:
    right = new_key()
    for wrong in (right[:-1], right + "x", right.upper(), new_secret(secrets.token_bytes), "sk-something-else"):
        error = read_refusal(client.get("/v1/files", headers=bearer(wrong)))
        assert error["code"] == "invalid_api_key"
        shown = error["message"].removeprefix("Incorrect API key provided: ").partition(".")[0]
        assert shown == wrong[: min(6, len(wrong) // 4)] + "********"
        assert wrong not in error["message"]


def test_60_a_revoked_key_is_a_wrong_key_and_opens_nothing(
    client: TestClient, new_key: Callable[..., str], store: BatchStore
) -> None:
    secret = new_key()
    store.keys.revoke(store.keys.list()[0].id, 1)
    assert read_refusal(client.get("/v1/files", headers=bearer(secret)))["code"] == "invalid_api_key"
    assert read_refusal(client.get("/v1/files"))["code"] is None, "no live key is left, and that opens nothing"


def test_60_an_id_or_a_hash_of_a_key_is_no_key(
    client: TestClient, new_key: Callable[..., str], store: BatchStore
) -> None:
    new_key()
    key = store.keys.list()[0]
    for guess in (key.id, key.hash, key.project_id):
        assert read_refusal(client.get("/v1/files", headers=bearer(guess)))["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/nonsense"), ("PUT", "/v1/files"), ("GET", "/nonsense"), ("GET", "//v1/files"), ("GET", "/V1/files")],
)
def test_a_stranger_learns_nothing_about_routes(
    client: TestClient, new_key: Callable[..., str], method: str, path: str
) -> None:
    new_key()
    assert client.request(method, f"http://testserver{path}").status_code == 401


@pytest.mark.parametrize("path", ["/health", "/docs", "/openapi.json"])
def test_what_holds_nobodys_data_needs_no_key(client: TestClient, new_key: Callable[..., str], path: str) -> None:
    new_key()
    assert client.get(path).status_code == 200


def test_the_front_page_tells_a_stranger_no_counts(
    client: TestClient, new_key: Callable[..., str], create: Callable[..., dict[str, Any]], store: BatchStore
) -> None:
    create()
    assert client.get("/").json()["open_batches"] == 1
    wait_until_seen(client, new_key())  # of the project that owned everything before there were keys

    for headers in ({}, bearer("wrong")):
        page = client.get("/", headers=headers).json()
        assert (page["open_batches"], page["request_counts"], page["dagster_url"]) == (None, None, None)
        assert page["name"] == "vllm-batch-dagster"


def wait_until_seen(client: TestClient, secret: str) -> None:
    """The running API has read the new key."""
    wait_for(lambda: client.get("/v1/files").status_code == 401)
    assert client.get("/v1/files", headers=bearer(secret)).status_code == 200


def test_the_front_page_counts_the_callers_own(
    client: TestClient, new_key: Callable[..., str], create: Callable[..., dict[str, Any]]
) -> None:
    create()
    secrets_of = {project: new_key(project) for project in (DEFAULT_PROJECT, "team-b")}
    wait_until_seen(client, secrets_of[DEFAULT_PROJECT])
    seen = {p: client.get("/", headers=bearer(s)).json()["open_batches"] for p, s in secrets_of.items()}
    assert seen == {DEFAULT_PROJECT: 1, "team-b": 0}


def test_60_the_sdk_sends_a_refused_call_once(base_url: str, new_key: Callable[..., str]) -> None:
    new_key()
    calls: list[str] = []
    transport = httpx2.Client(event_hooks={"request": [lambda request: calls.append(str(request.url))]})
    stranger = OpenAI(base_url=f"{base_url}/v1", api_key="vb-wrong-key", http_client=transport)
    with stranger, pytest.raises(AuthenticationError) as caught:
        stranger.files.create(file=b"x" * (8 << 20), purpose="batch")
    assert len(calls) == 1
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id
    assert caught.value.request_id.startswith("req_")


def test_60_the_sdk_works_with_a_key(base_url: str, new_key: Callable[..., str]) -> None:
    with OpenAI(base_url=f"{base_url}/v1", api_key=new_key(), _strict_response_validation=True) as client:
        file = client.files.create(file=b"{}\n", purpose="batch")
        assert client.files.content(file.id).content == b"{}\n"


class Timer:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Ring:
    """A KeyRing over a store in memory, with one key, on clocks that the test sets."""

    def __init__(self) -> None:
        self.store, self.clock, self.timer = MemoryStore(), FixedClock(), Timer()
        self.ring = KeyRing(self.store.keys, self.clock, self.timer)
        self.secret = new_secret(secrets.token_bytes)
        self.store.keys.add(make_key(self.secret, "team-a", "", secrets.token_bytes, 1))

    @property
    def key_id(self) -> str:
        return self.store.keys.list()[0].id

    @property
    def last_used_at(self) -> int | None:
        return self.store.keys.list()[0].last_used_at


async def test_a_revoked_key_is_known_for_a_second_at_most() -> None:
    it = Ring()
    assert await it.ring.find(it.secret)
    it.store.keys.revoke(it.key_id, 2)

    it.timer.now = FRESH_SECONDS - 0.01
    assert await it.ring.find(it.secret), "the store is not asked for every request"
    it.timer.now = FRESH_SECONDS
    assert await it.ring.find(it.secret) is None
    assert not await it.ring.is_empty(), "a revoked key keeps the API closed"


async def test_the_use_of_a_key_is_noted_once_an_hour() -> None:
    it = Ring()
    began = int(it.clock())
    await it.ring.find(it.secret)
    assert it.last_used_at == began
    it.clock.advance(USE_SECONDS - 1)
    await it.ring.find(it.secret)
    assert it.last_used_at == began
    it.clock.advance(1)
    await it.ring.find(it.secret)
    assert it.last_used_at == began + USE_SECONDS


def test_a_store_that_does_not_answer_lets_nobody_in(
    client: TestClient, store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise StorageFailure("the disk is gone")

    monkeypatch.setattr(store.keys, "list", fail)
    answer = client.get("/v1/files")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
