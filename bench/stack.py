"""The product under measurement: `vllm-batch up` with a state folder and ports of its own, and all of it stopped after.

In: settings as variables. Out: clients, the times of a batch, the pids of the services.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import psutil

from bench.errors import BenchFailed
from bench.terminal import say
from vllm_batch_dagster.adapters.engine import EngineStatus, engine_status, stop_engine
from vllm_batch_dagster.cli.processes import stack_processes
from vllm_batch_dagster.cli.state_folder import holder_pid, read_record
from vllm_batch_dagster.composition import build_store
from vllm_batch_dagster.core.models import ChunkSummary
from vllm_batch_dagster.settings import Settings

_START_SECONDS = 180
_DOWN_SECONDS = 150

# Settings of the reader that also hold for a measurement: which engine, and how it is started.
_KEPT = frozenset(
    (
        *("MODELS_FILE", "ENGINE_PYTHON", "ENGINE_DEVICE", "ENGINE_ARGS", "CPU_KVCACHE_GIB"),
        *("MAX_NUM_SEQS", "MAX_NUM_BATCHED_TOKENS", "GPU_MEMORY_UTILIZATION"),
    )
)


def forget_settings() -> None:
    """Take the reader's other settings out of our environment: a figure must not depend on them."""
    for name in {field.upper() for field in Settings.model_fields} - _KEPT:
        os.environ.pop(name, None)


class Stack:
    """A stack that runs from `running_stack` on. `folder` is where its state and our files are."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        ports = zip(("CODE_SERVER_PORT", "DAGSTER_PORT", "API_PORT"), _free_ports(3), strict=True)
        variables = {
            "VLLM_BATCH_HOME": str(folder / "home"),
            "ENGINE_IDLE_SECONDS": "0",  # a warm engine stays warm, however long the other side takes
            **{name: str(port) for name, port in ports},
            **settings,
        }
        self.env = {**os.environ, **variables}
        self.settings = Settings(_env_file=None, **{name.lower(): value for name, value in variables.items()})  # type: ignore[arg-type]
        self.client = openai.OpenAI(base_url=f"{self.api_url}/v1", api_key="unused")

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.settings.api_port}"

    @property
    def dagster_url(self) -> str:
        return f"http://127.0.0.1:{self.settings.dagster_port}"

    @property
    def home(self) -> Path:
        return self.settings.vllm_batch_home

    def start(self) -> None:
        """Start it and return when all services are ready. Raises BenchFailed."""
        log = self.folder / "up.log"
        with log.open("ab") as output:
            up = subprocess.Popen(
                [sys.executable, "-m", "vllm_batch_dagster.cli", "up"],
                cwd=self.folder,  # where no .env is
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us; we stop it in order
            )
        deadline = time.monotonic() + _START_SECONDS
        while not ((record := read_record(self.home)) and record.is_ready):
            if up.poll() is not None or time.monotonic() > deadline:
                raise BenchFailed(f"the stack did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop it with its engine; what an interrupted `down` leaves is killed."""
        command = [sys.executable, "-m", "vllm_batch_dagster.cli", "down"]
        try:
            subprocess.run(
                command,
                cwd=self.folder,
                env=self.env,
                capture_output=True,
                timeout=_DOWN_SECONDS,
                start_new_session=True,
            )
        finally:
            for process in stack_processes(self.home):
                with suppress(psutil.Error):
                    process.kill()

    def pid_of(self, service: str) -> int:
        """Return the pid of `api`, `web`, `daemon` or `code`."""
        record = read_record(self.home)
        if record is None:
            raise BenchFailed("the stack is gone: its log says why")
        return next(each.pid for each in record.services if each.name == service)

    @property
    def has_engine(self) -> bool:
        return engine_status(self.settings.engine_folder) is not None

    def engine(self) -> EngineStatus:
        status = engine_status(self.settings.engine_folder)
        if status is None:
            raise BenchFailed("no engine runs where one was expected to be warm")
        return status

    def stop_engine(self) -> None:
        stop_engine(self.settings.engine_folder)

    def chunk_summaries(self, batch_id: str) -> list[ChunkSummary]:
        """Return what the store has of each chunk of a finished batch, in order."""
        chunks = build_store(self.settings).chunks.list(batch_id)
        return [chunk.summary for chunk in chunks if chunk.summary is not None]

    def inference_span(self, batch_id: str) -> tuple[float, float]:
        """Return when the first line of a finished batch was sent and when its last answer came, in unix seconds."""
        chunks = self.chunk_summaries(batch_id)
        return min(each.first_sent_at for each in chunks), max(each.last_answer_at for each in chunks)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold every process of the stack still, an idle engine included: what runs meanwhile has the machine alone."""
        up = holder_pid(self.home)
        processes = [*([psutil.Process(up)] if up else []), *stack_processes(self.home)]
        try:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            yield
        finally:
            for process in reversed(processes):
                with suppress(psutil.NoSuchProcess):
                    process.resume()


@contextmanager
def running_stack(folder: Path | Stack, **settings: str) -> Iterator[Stack]:
    """Run a stack until the block ends, however it ends: the one that is given, or one of these settings."""
    stack = folder if isinstance(folder, Stack) else Stack(folder, settings)
    say("starting the stack")
    try:
        stack.start()
        yield stack
    finally:
        with _uninterrupted():
            say("stopping the stack")
            stack.stop()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave an engine behind."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
