"""The API over the real SQL store and local files in a temporary folder: in process, and behind a real uvicorn."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from starlette.testclient import TestClient

from api_shim.app import create_app
from api_shim.server import bind_listener, make_config
from tests.unit.conftest import Rig
from vllm_batch_dagster.adapters.local_files import LocalFiles, LocalWorkspace
from vllm_batch_dagster.adapters.memory import FixedClock, MemoryCatalog
from vllm_batch_dagster.adapters.store import open_store
from vllm_batch_dagster.core.keys import make_key, new_secret
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import BatchStore, FileStore
from vllm_batch_dagster.core.states import BatchEvent
from vllm_batch_dagster.settings import Settings

# Long ones: on a machine that others use too, a process may get no time for a while.
PATIENCE_SECONDS = 60

MODEL = Model(name="tiny", path="models/tiny", aliases=("tiny-latest",))

BATCH_PARAMS: dict[str, Any] = {
    "input_file_id": "file-1",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}
EVENTS_TO = {
    "validating": (),
    "failed": (BatchEvent.INVALID,),
    "in_progress": (BatchEvent.PLANNED,),
    "finalizing": (BatchEvent.PLANNED, BatchEvent.MERGE),
    "completed": (BatchEvent.PLANNED, BatchEvent.MERGE, BatchEvent.PUBLISHED),
    "expired": (BatchEvent.PLANNED, BatchEvent.DEADLINE),
    "cancelling": (BatchEvent.PLANNED, BatchEvent.CANCEL),
    "cancelled": (BatchEvent.PLANNED, BatchEvent.CANCEL, BatchEvent.STOPPED),
}


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll until true."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(vllm_batch_home=tmp_path / "home", postgres_host="", max_file_bytes=2 << 20)


@pytest.fixture
def store(settings: Settings) -> BatchStore:
    settings.vllm_batch_home.mkdir(parents=True)
    return open_store(settings.database_url)


@pytest.fixture
def files(settings: Settings) -> FileStore:
    return LocalFiles(settings.files_folder)


@pytest.fixture
def app(settings: Settings, store: BatchStore, files: FileStore, clock: FixedClock) -> FastAPI:
    workspace = LocalWorkspace(settings.batches_folder, settings.datasets_folder)
    return create_app(settings, store, files, workspace, MemoryCatalog([MODEL]), clock)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """In process. A crash of a route becomes its response, as behind a real server."""
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def base_url(app: FastAPI) -> Iterator[str]:
    """A real uvicorn on a free port, in a thread of this process, set up as in production."""
    listener = bind_listener("127.0.0.1", 0)
    server = uvicorn.Server(make_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def sdk(base_url: str) -> Iterator[OpenAI]:
    """The official client, which here refuses any answer that differs from its types."""
    with OpenAI(base_url=f"{base_url}/v1", api_key="any", _strict_response_validation=True) as sdk:
        yield sdk


@pytest.fixture
def upload(client: TestClient) -> Callable[..., dict[str, Any]]:
    """Upload through the API in process; returns the File object."""

    def upload(content: bytes = b"{}\n", **fields: str) -> dict[str, Any]:
        form = {"purpose": "batch", **fields}
        answer = client.post("/v1/files", data=form, files={"file": ("in.jsonl", content)})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    return upload


@pytest.fixture
def new_key(store: BatchStore, clock: FixedClock) -> Callable[..., str]:
    """Make a key of a project in the store, as the command line does; returns what its holder sends.

    A running API sees it within a second, so make it before the first request.
    """

    def new_key(project: str = "default") -> str:
        secret = new_secret(secrets.token_bytes)
        store.keys.add(make_key(secret, project, "", secrets.token_bytes, int(clock())))
        return secret

    return new_key


@pytest.fixture
def stored_files(settings: Settings) -> Callable[[], int]:
    """Count the files on disk below the file store, partial ones included."""

    def stored_files() -> int:
        return sum(1 for path in settings.files_folder.rglob("*") if path.is_file())

    return stored_files


@pytest.fixture
def create(client: TestClient) -> Callable[..., dict[str, Any]]:
    """Create a batch through the API in process; returns the Batch object."""

    def create(**params: object) -> dict[str, Any]:
        answer = client.post("/v1/batches", json={**BATCH_PARAMS, **params})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    return create


@pytest.fixture
def lead_to(create: Callable[..., dict[str, Any]], store: BatchStore, clock: FixedClock) -> Callable[[str], str]:
    """Make a batch and lead it to a status, as the graph would. Returns its id."""

    def lead_to(status: str) -> str:
        batch_id = str(create()["id"])
        for event in EVENTS_TO[status]:
            store.batches.advance(batch_id, event, int(clock()))
        return batch_id

    return lead_to


@pytest.fixture
def rig(settings: Settings, store: BatchStore, files: FileStore, clock: FixedClock) -> Rig:
    """The stages over the stores of the API: what Dagster's runs would do."""
    rig = Rig(settings.vllm_batch_home)
    rig.store, rig.files, rig.clock = store, files, clock
    rig.workspace = LocalWorkspace(settings.batches_folder, settings.datasets_folder)
    return rig
