"""A whole stack that can be hurt: `vllm-batch up` on a simulated engine, with failpoints, a proxy and a small disk."""

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil

from tests.dagster_ui import DagsterUi
from tests.e2e.batches import TERMINAL, chat, read, submit
from tests.faults.engine_group import write_engine_python
from tests.faults.invariants import Line, asked, check_answers, check_path, check_redone, journalled
from tests.faults.observer import Observer
from tests.faults.proxy import FaultProxy
from tests.stack import STOP_SECONDS, Stack, descendants, free_ports, wait_for
from tests.target import POOL_LIMIT
from vllm_batch_dagster.adapters.engine import engine_status
from vllm_batch_dagster.adapters.engine.processes import marked_groups
from vllm_batch_dagster.adapters.simulated.process import SimulatedProcess
from vllm_batch_dagster.cli.processes import is_alive, kill_processes, stack_processes
from vllm_batch_dagster.cli.state_folder import read_record
from vllm_batch_dagster.cli.verify import check as verify
from vllm_batch_dagster.failpoints import VARIABLE
from vllm_batch_dagster.settings import Settings

MODEL = "tiny"
LATENCY, SEQS = 0.05, 8
LINES, CHUNK, SLOTS = 48, 16, 4
# Long ones, the first the longest: what is held must stay so until everything before it has been waited for.
HOLD_SECONDS = 1500
HELD_SECONDS = 300
END_SECONDS = 600
RUNS_AT_ONCE = 8
FILLER = "filler"
ENDED_RUNS = ("SUCCESS", "FAILURE", "CANCELED")
SETTINGS = {
    "CHUNK_SIZE": str(CHUNK),
    "CHUNK_SLOTS": str(SLOTS),
    "MAX_NUM_SEQS": str(SEQS),
    "JOURNAL_COMMIT_SECONDS": "0.05",
    "ENGINE_STALL_SECONDS": "5",
    "ENGINE_START_SECONDS": "60",
    "LOG_FORMAT": "json",
}


@dataclass
class Mark:
    """Where a batch stood when a fault came: lines whose answer was durable, and how many had been asked."""

    durable: set[int]
    asked: int


@dataclass
class Submitted:
    """A batch under test. `marks` are taken at each fault."""

    id: str
    lines: Sequence[Line]
    marks: list[Mark] = field(default_factory=list)
    may_end: frozenset[str] = frozenset({"completed"})


class World:
    """See the module docstring. `proxy` is None where the engine is our own."""

    def __init__(self, folder: Path, stack: Stack, witness: Path, proxy: FaultProxy | None) -> None:
        self.folder, self.stack, self.witness, self.proxy = folder, stack, witness, proxy
        self.points = folder / "failpoints"
        self.points.mkdir()
        stack.env[VARIABLE] = str(self.points)
        self.client = openai.OpenAI(base_url=stack.api_url, api_key="any", max_retries=10)
        self.ui = DagsterUi(stack.dagster_url)
        self.observer = Observer(stack.api_url)
        self._up: subprocess.Popen[bytes] | None = None
        self._second: subprocess.Popen[bytes] | None = None
        self.submitted: list[Submitted] = []

    @property
    def home(self) -> Path:
        return self.stack.home

    def start(self) -> None:
        self._up = self.stack.start_and_wait()
        self.ui.ask(POOL_LIMIT, limit=RUNS_AT_ONCE)

    @property
    def is_up(self) -> bool:
        return self._up is not None and self._up.poll() is None

    def crash(self) -> None:
        """As a power cut: every process of the stack is killed at once, `up` first."""
        assert self._up is not None
        self._up.kill()
        self._up.wait()
        kill_processes(stack_processes(self.home))

    def stop(self) -> None:
        self.stack.run("down")
        if self._up is not None:
            self._up.wait()

    def submit(self, lines: int = LINES) -> Submitted:
        """Create a batch; the API may be dead just now."""
        made = [chat(number, MODEL) for number in range(lines)]
        self.submitted.append(Submitted(submit(self.client, made).id, made))
        return self.submitted[-1]

    def arm(self, point: str, batch: Submitted, order: str) -> None:
        partial = self.points / f"{batch.id}.partial"
        partial.write_text(order)
        partial.replace(self.points / f"{point}.{batch.id}")

    def hit(self, point: str, batch: Submitted) -> int | None:
        """Return the pid of the process that the point has caught, None as long as it has not."""
        try:
            return int((self.points / f"{point}.{batch.id}.hit").read_text())
        except FileNotFoundError:
            return None

    def release(self, point: str, batch: Submitted) -> None:
        """Let what is held there go on. Nothing is held there again."""
        for name in (f"{point}.{batch.id}", f"{point}.{batch.id}.hit"):
            (self.points / name).unlink(missing_ok=True)

    def mark_all(self) -> None:
        """Note where the batches stand, for `check`. The journals first: what is in them was asked before."""
        durable = {batch.id: journalled(self.home, batch.id) for batch in self.submitted}
        for batch in self.submitted:
            if durable[batch.id]:
                batch.marks.append(Mark(durable[batch.id], len(asked(self.witness, batch.id))))

    def fill_disk(self) -> None:
        """Leave no byte on the file system of the state folder, which is a small one, until `mend`."""
        assert self.home.is_mount(), "the state folder must be a file system of its own"
        with self.home.joinpath(FILLER).open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))  # at last a part of it, then ENOSPC

    def start_second_daemon(self) -> None:
        """Let two daemons tick until `mend`, as when somebody starts one by hand."""
        own = psutil.Process(self.pid_of("daemon"))
        self._second = subprocess.Popen(
            own.cmdline(), env=own.environ(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def mend(self) -> None:
        """End an outage: a wire that works, a disk with room, one daemon."""
        if self._second is not None:
            self._second.terminate()
            self._second.wait()
            self._second = None
        self.home.joinpath(FILLER).unlink(missing_ok=True)
        if self.proxy is not None:
            self.proxy.mend()

    def pid_of(self, service: str) -> int:
        record = read_record(self.home)
        assert record is not None
        return next(each.pid for each in record.services if each.name == service)

    def engine_pid(self, name: str = "") -> int:
        """Return the pid of the API server of our own engine, or of the process below it with this name. Waits until
        there is one: another fault may just have ended it."""
        end = time.monotonic() + HELD_SECONDS
        while (found := self.find_engine(name)) is None:
            assert time.monotonic() < end, "no engine came"
            time.sleep(0.1)
        return found

    def find_engine(self, name: str = "") -> int | None:
        """Return the same, or None when there is none now."""
        status = engine_status(self.home / "engine")
        with suppress(psutil.Error, IndexError):
            family = [psutil.Process(status.pid), *descendants(status.pid)] if status else []
            return next((each.pid for each in family if not name or name == each.cmdline()[-1]), None)
        return None

    def expire(self, batch: Submitted) -> None:
        """Let the window of a batch end now."""
        with sqlite3.connect(self.home / "batches.db", timeout=30) as database:
            database.execute("UPDATE batches SET expires_at = ? WHERE id = ?", (int(time.time()), batch.id))

    def wait_ended(self, batches: Sequence[Submitted], seconds: float = END_SECONDS) -> None:
        """Return when every batch has its last status and no run of it is left."""
        wait_for(lambda: all(self.status(batch) in TERMINAL for batch in batches), seconds)
        wait_for(lambda: not any(self.unfinished(batch) for batch in batches), seconds)

    def status(self, batch: Submitted) -> str:
        return str(self.client.batches.retrieve(batch.id).status)

    def unfinished(self, batch: Submitted) -> list[str]:
        """Return the runs that have not ended; while the webserver is away, which is one of the faults, who knows."""
        try:
            runs = self.ui.runs(batch.id)
        except httpx.TransportError:
            return ["unknown"]
        return [str(run["runId"]) for run in runs if run["status"] not in ENDED_RUNS]

    def check(self, batch: Submitted) -> list[str]:
        """Return every promise that a batch which has ended breaks. See tests/faults/invariants.py."""
        ended = self.client.batches.retrieve(batch.id)
        answers = read(self.client, ended.output_file_id) if ended.output_file_id else []
        errors = read(self.client, ended.error_file_id) if ended.error_file_id else []
        counts = (
            ended.request_counts.model_dump() if ended.request_counts else {"total": 0, "completed": 0, "failed": 0}
        )
        problems = check_answers(batch.lines, ended.status, answers, errors, counts)
        if ended.status not in batch.may_end:
            problems.append(f"it ended as {ended.status}")
        wait_for(lambda: self.observer.path(batch.id).statuses[-1:] == [ended.status], STOP_SECONDS)
        problems += check_path(self.observer.path(batch.id), ended.status)
        problems += self._verify(batch)
        for mark in batch.marks:
            problems += check_redone(mark.durable, asked(self.witness, batch.id)[mark.asked :])
        return problems

    def _verify(self, batch: Submitted) -> list[str]:
        """Ask `vllm-batch verify`, whose report has every problem as a sentence."""
        report = verify(batch.id, Settings(vllm_batch_home=self.home, _env_file=None), quiet=True)
        return [f"verify: {problem.file}: {problem.message}" for problem in report.problems]

    def assert_invariants(self, batch: Submitted) -> None:
        assert self.check(batch) == [], f"{batch.id}; its runs: {self.ui.runs(batch.id)}"

    def redone(self, batch: Submitted) -> int:
        """Return how many times a line was sent that had been sent before."""
        lines = asked(self.witness, batch.id)
        return len(lines) - len(set(lines))

    def assert_tidy(self) -> None:
        """Nothing is left of runs that were killed: no process, and of the engine one group at most."""
        wait_for(lambda: not self.run_workers(), STOP_SECONDS)
        wait_for(lambda: len(marked_groups(self.home / "engine")) <= 1, STOP_SECONDS)

    def run_workers(self) -> list[psutil.Process]:
        """Return the living run workers, also those whose code server is dead."""
        found = []
        for process in stack_processes(self.home):
            with suppress(psutil.Error):
                if any("multiprocessing.spawn" in word for word in process.cmdline()) and is_alive(process):
                    found.append(process)
        return found


@contextmanager
def own_engine(folder: Path, latency: float = LATENCY, **settings: str) -> Iterator[World]:
    """A stack whose engine is our own: three processes that we start, watch and replace."""
    witness = folder / "witness"
    python = write_engine_python(folder, witness, latency)
    stack = Stack(
        folder,
        ENGINE_URL="",
        ENGINE_PYTHON=str(python),
        ENGINE_DEVICE="cpu",
        ENGINE_PORT=str(free_ports(1)[0]),
        **SETTINGS | settings,
    )
    yield from _run(World(folder, stack, witness, None))


@contextmanager
def engine_behind_proxy(folder: Path, **settings: str) -> Iterator[World]:
    """A stack whose engine is somebody else's, behind a wire that can be cut."""
    witness = folder / "witness"
    options = ("--model", MODEL, "--latency", str(LATENCY), "--max-num-seqs", str(SEQS))
    with ExitStack() as ending:
        engine = ending.enter_context(SimulatedProcess(*options, witness=witness))
        proxy = FaultProxy(engine.port)
        ending.callback(proxy.close)
        stack = Stack(folder, ENGINE_URL=proxy.url, **SETTINGS | settings)
        yield from _run(World(folder, stack, witness, proxy))


def _run(world: World) -> Iterator[World]:
    try:
        world.start()
        world.observer.start()
        yield world
        world.observer.stop()
    finally:
        world.stop()
        kill_processes(stack_processes(world.home))


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone already."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def until(is_true: Callable[[], bool], seconds: float) -> bool:
    """Poll; return whether it came true in time."""
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
