"""A whole stack for the length of a `with` block, and one batch through it. Used by the demo and the screenshots.

In: a state folder and settings. Out: a running `vllm-batch up` on free ports, with its log in the state folder; when
the block ends, however it ends, everything is stopped, the engine included.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import openai
from openai.types import Batch

from scripts.commands import ROOT
from vllm_batch_dagster.cli.state_folder import read_record

QUESTIONS = ROOT / "examples" / "questions.jsonl"
# `up` gives each service its own limit and says which one was late: this one is for the case that it hangs.
START_SECONDS = 400
STOP_SECONDS = 90
POLL_SECONDS = 0.3
TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})

_PORTS = {"API_PORT": 4080, "DAGSTER_PORT": 3000, "CODE_SERVER_PORT": 4266}
_LOG_TAIL = 15
_COMPLAINT = "vllm-batch: "
# What the engine manager reports to the run of a chunk, as the code server's lines of the log carry it.
_ENGINE_SENTENCE = re.compile(r"^code .* - chunk_results - (.*\bengine\b.*)")
_ACTIVE_RUNS = "{runsOrError(filter:{statuses:[QUEUED,NOT_STARTED,STARTING,STARTED]}){...on Runs{results{runId}}}}"

# Proxies of the environment are not meant for our own machine.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class StackFailed(Exception):
    """The stack or a batch did not do what it should; the message is one sentence, then perhaps lines of a log."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A running `vllm-batch up` on the state folder `home`."""

    home: Path
    api_port: int
    dagster_port: int
    process: subprocess.Popen[bytes]
    client: openai.OpenAI

    @property
    def log(self) -> Path:
        return self.home / "up.log"

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def dagster_url(self) -> str:
        return f"http://127.0.0.1:{self.dagster_port}"

    def check_alive(self) -> None:
        """Raise StackFailed when `up` has ended, with what it said."""
        code = self.process.poll()
        if code is not None:
            raise StackFailed(f"the stack ended with exit code {code}: {self.complaint()}")

    def complaint(self) -> str:
        """Return what `up` said before it gave up, else the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith(_COMPLAINT)]
        words = lines[starts[-1] :] if starts else lines[-_LOG_TAIL:]
        return "\n".join(words).removeprefix(_COMPLAINT)

    def is_busy(self) -> bool:
        """True while Dagster has a run that has not ended."""
        request = urllib.request.Request(
            f"{self.dagster_url}/graphql",
            data=json.dumps({"query": _ACTIVE_RUNS}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with _direct.open(request, timeout=30) as response:
            return bool(json.load(response)["data"]["runsOrError"]["results"])


@contextmanager
def running_stack(home: Path, settings: Mapping[str, str]) -> Iterator[Stack]:
    """Run `vllm-batch up` until the block ends. `settings` are environment variables; ports are chosen here.

    Raises StackFailed when it does not become ready.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    ports = {name: choose_port(wanted) for name, wanted in _PORTS.items()}
    environment = {**os.environ, **settings, "VLLM_BATCH_HOME": str(home), **{k: str(v) for k, v in ports.items()}}
    command = [str(Path(sys.executable).with_name("vllm-batch")), "up"]
    with (home / "up.log").open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches us alone, and `up` gets one signal: a second one makes it kill instead of stop.
            start_new_session=True,
        )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{ports['API_PORT']}/v1", api_key="unused")
        stack = Stack(home, ports["API_PORT"], ports["DAGSTER_PORT"], process, client)
        _wait_until_ready(stack)
        yield stack
    finally:
        _stop(process)


def choose_port(wanted: int) -> int:
    """Return `wanted`, or a free port when another program has it."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(stack: Stack) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ((record := read_record(stack.home)) and record.pid == stack.process.pid and record.is_ready):
        stack.check_alive()
        if time.monotonic() > deadline:
            raise StackFailed(f"the stack was not ready after {START_SECONDS} s: {stack.complaint()}")
        time.sleep(POLL_SECONDS)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop `up` and wait until it has stopped the rest. A further Ctrl-C, or too long a wait, tells it to hurry."""
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
            return
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            continue
    process.kill()
    process.wait()


def submit(client: openai.OpenAI, questions: Path = QUESTIONS) -> str:
    """Upload a file and create the batch: the two calls of OpenAI's guide. Returns the batch's id."""
    with questions.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="batch")
    batch = client.batches.create(
        input_file_id=uploaded.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"name": "demo"},
    )
    return batch.id


def poll(stack: Stack, batch_id: str, seconds: float) -> Iterator[Batch]:
    """Yield the batch again and again, the last time as it ended. Raises StackFailed after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stack.check_alive()
        with _explaining(stack):
            batch = stack.client.batches.retrieve(batch_id)
        yield batch
        if batch.status in TERMINAL:
            return
        time.sleep(POLL_SECONDS)
    raise StackFailed(f"{batch_id} did not finish within {seconds:.0f} s: see {stack.log}")


def wait_until_idle(stack: Stack, seconds: float = 120) -> None:
    """Wait for the runs that go on after a batch is completed: deliveries and curation."""
    deadline = time.monotonic() + seconds
    while _asks_busy(stack):
        if time.monotonic() > deadline:
            raise StackFailed(f"Dagster still has active runs after {seconds:.0f} s: see {stack.log}")
        time.sleep(POLL_SECONDS)


def _asks_busy(stack: Stack) -> bool:
    with _explaining(stack):
        return stack.is_busy()


@contextmanager
def _explaining(stack: Stack) -> Iterator[None]:
    """Turn a lost connection into what `up` says about it: it stops everything when one service dies."""
    try:
        yield
    except (openai.APIConnectionError, OSError) as error:
        with suppress(subprocess.TimeoutExpired):
            stack.process.wait(STOP_SECONDS)
        stack.check_alive()
        raise StackFailed(f"a service does not answer ({error}): see {stack.log}") from error


class EngineWords:
    """The newest sentence about the engine in the log of a stack; every call reads only what is new."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = 0
        self._last = ""

    def latest(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        self._offset += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            if found := _ENGINE_SENTENCE.match(line):
                self._last = found.group(1)
        return self._last
