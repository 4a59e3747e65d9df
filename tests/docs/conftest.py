"""A server for the examples of the pages: the real API, stores and stages, an echo in place of vLLM, no Dagster."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from api_shim.app import create_app
from api_shim.server import bind_listener, make_config
from vllm_batch_dagster.adapters.memory import EchoEngine, MemoryCatalog
from vllm_batch_dagster.core.models import Batch, Model
from vllm_batch_dagster.core.reconciling import GraphState, Launch, Step, decide_launches
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.settings import PROJECT_ROOT, Settings
from vllm_batch_dagster.stages.inference import InferencePorts, RangeInference
from vllm_batch_dagster.stages.merging import merge_batch
from vllm_batch_dagster.stages.validation import validate_batch

DEMO_MODEL = Model(name="smollm2-135m-instruct", path="models/smollm2")
LOOK_SECONDS = 0.05


class Worker:
    """Runs what the sensor would ask for, in one thread, until it is stopped."""

    def __init__(self, services: Services, catalog: MemoryCatalog) -> None:
        self._services, self._catalog, self._engines = services, catalog, EchoEngine()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            store = self._services.store
            for batch in store.batches.open():
                chunks = store.chunks.list(batch.id)
                graph = GraphState({chunk.index: 1 for chunk in chunks if chunk.is_published})
                for launch in decide_launches(batch, chunks, graph, time.time()):
                    self._run(launch, batch)

    def _run(self, launch: Launch, batch: Batch) -> None:
        its = self._services
        if launch.step is Step.VALIDATE:
            validate_batch(batch, its.store, its.files, its.workspace, self._catalog, its.limits, its.clock)
        elif launch.step is Step.INFER:
            asyncio.run(self._infer(batch))
        else:
            merge_batch(batch, its.merge_ports, run_id="run")

    async def _infer(self, batch: Batch) -> None:
        its = self._services
        ports = InferencePorts(its.store, its.files, its.workspace, self._engines, its.clock)
        chunks = its.store.chunks.list(batch.id)
        await RangeInference(
            ports,
            its.inference_policy,
            batch,
            DEMO_MODEL,
            chunks,
            fresh=frozenset(),
            run_id="run",
            on_done=lambda _done: None,
            report=lambda _sentence: None,
        ).run()


@pytest.fixture
def base_url(tmp_path: Path) -> Iterator[str]:
    """Where the server listens; its batches complete by themselves."""
    settings = Settings(vllm_batch_home=tmp_path / "home", postgres_host="", chunk_size=15)
    services, catalog = Services(settings), MemoryCatalog([DEMO_MODEL])
    app = create_app(settings, services.store, services.files, services.workspace, catalog, time.time)
    listener = bind_listener("127.0.0.1", 0)
    server = uvicorn.Server(make_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with Worker(services, catalog):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A working directory in which the examples find what the repository ships."""
    (tmp_path / "examples").symlink_to(PROJECT_ROOT / "examples")
    return tmp_path
