"""Runs the simulated engine as a process of its own, and tells it to fail. For tests, benchmarks and demonstrations."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from vllm_batch_dagster.adapters.simulated.faults import VARIABLE, Faults

_MODULE = "vllm_batch_dagster.adapters.simulated"
_ROOT = Path(__file__).resolve().parents[3]
_HOST = "127.0.0.1"
# Long: a machine that others use too may give a new process no time for a while.
_READY_SECONDS = 120.0
_ANSWER_SECONDS = 60.0


def simulated_command(*options: str) -> tuple[str, ...]:
    """Return an EngineConfig.command that makes our own engine a simulated one. `options` are of its command line."""
    served = ("--model", "{names}", "--max-num-seqs", "{max_num_seqs}")
    return ("{python}", "-m", _MODULE, "--port", "{port}", *served, *options)


def import_path() -> str:
    """Return a PYTHONPATH with which another process finds this package, installed or not."""
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))


def set_faults(port: int, faults: Faults) -> None:
    """Tell the simulated engine on `port` to fail. Raises ConnectionError when it refuses."""
    status, answer = _call(port, "POST", "/faults", msgspec.json.encode(faults))
    if status != 200:
        raise ConnectionError(f"the simulated engine on port {port} refuses the faults: {answer.decode()}")


class SimulatedProcess:
    """A simulated engine that runs from `with` on. `options` are of its command line; `witness` is where it notes
    the X-Request-Id of every request."""

    def __init__(self, *options: str, faults: Faults | None = None, witness: Path | None = None) -> None:
        self._options = options if witness is None else (*options, "--witness", str(witness))
        self._environment = {} if faults is None else {VARIABLE: json.dumps(msgspec.to_builtins(faults))}
        self._witness = witness
        self._process: subprocess.Popen[bytes] | None = None
        # Held for as long as we are there: nobody else is given the port before the start, or between two of them.
        self._held = hold_port()
        self.port = int(self._held.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def __enter__(self) -> "SimulatedProcess":
        self.start()
        return self

    def __exit__(self, _type: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        self.kill()
        self._held.close()

    def start(self) -> None:
        """Start it, again on the same port after `kill`. Raises TimeoutError when it does not answer /health."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, "--port", str(self.port), *self._options],
            env={**os.environ, "PYTHONPATH": import_path(), **self._environment},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_ready(self.port, self._process)

    def kill(self) -> None:
        """End it as SIGKILL does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def is_over(self) -> bool:
        """True when it has ended, by itself or by `kill`."""
        return self._process is not None and self._process.poll() is not None

    def wait(self, seconds: float) -> int:
        """Return its exit code once it has ended by itself. Raises subprocess.TimeoutExpired."""
        if self._process is None:
            raise RuntimeError("the simulated engine was never started")
        return self._process.wait(seconds)

    def set_faults(self, faults: Faults) -> None:
        set_faults(self.port, faults)

    def received(self) -> Sequence[str]:
        """Return the X-Request-Id of every request so far, in the order of arrival."""
        return self._witness.read_text().split() if self._witness is not None else ()

    def ask(self, path: str, body: Mapping[str, object] | None = None) -> tuple[int, bytes]:
        """Return status and body of a plain request, past every client of ours."""
        raw = None if body is None else json.dumps(body).encode()
        return _call(self.port, "GET" if raw is None else "POST", path, raw)


def hold_port(port: int = 0) -> socket.socket:
    """Return a socket that is bound to `port`, by default any free one, and does not listen: a server that sets
    SO_REUSEADDR too can listen beside it. Raises OSError when the port is taken."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((_HOST, port))
    except OSError:
        held.close()
        raise
    return held


def _wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _READY_SECONDS
    while not _is_healthy(port):
        if process.poll() is not None or time.monotonic() > end:
            raise TimeoutError(f"the simulated engine on port {port} did not start (exit code {process.returncode})")
        time.sleep(0.05)


def _is_healthy(port: int) -> bool:
    try:
        return _call(port, "GET", "/health", None)[0] == 200
    except OSError:
        return False


def _call(port: int, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(_HOST, port, timeout=_ANSWER_SECONDS)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
