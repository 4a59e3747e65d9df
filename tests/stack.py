"""`vllm-batch` with its real services on a state folder and ports of its own, for the tests of the whole stack."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from tests.ports import hold_ports
from vllm_batch_dagster.cli.processes import is_alive, stack_processes, wait_until
from vllm_batch_dagster.cli.state_folder import read_record
from vllm_batch_dagster.settings import PROJECT_ROOT, Settings

# Long ones: on a machine that others use too, a process may get no time for a while.
START_SECONDS = 300
STOP_SECONDS = 120
PORTS = ("CODE_SERVER_PORT", "DAGSTER_PORT", "API_PORT")

_held = ExitStack()  # the ports of `free_ports`, until this process ends


class Stack:
    """`vllm-batch` on a state folder and ports of its own. `settings` are variables; without them no engine answers."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.words = folder / "words"
        ours = {name.upper() for name in Settings.model_fields}
        self.env = {
            **{name: value for name, value in os.environ.items() if name not in ours},
            **dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True)),
            "VLLM_BATCH_HOME": str(self.home),
            "MODELS_FILE": str(write_catalogue(folder)),
            "ENGINE_URL": "http://127.0.0.1:9",
            "PYTHONPATH": str(PROJECT_ROOT),
            **settings,
        }

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.env['API_PORT']}/v1"

    @property
    def dagster_url(self) -> str:
        return f"http://127.0.0.1:{self.env['DAGSTER_PORT']}"

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, as in another terminal."""
        return subprocess.run(
            command(*arguments),
            cwd=self.folder,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )

    def start(self) -> "subprocess.Popen[bytes]":
        """Run `up` as a terminal does, in a process group of its own; its words go to a file."""
        with self.words.open("wb") as words:
            return subprocess.Popen(
                command("up"),
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                start_new_session=True,
            )

    def start_and_wait(self) -> "subprocess.Popen[bytes]":
        up = self.start()
        wait_for(lambda: "ready in" in self.said() or up.poll() is not None, START_SECONDS)
        assert up.poll() is None, self.said()
        return up

    def said(self) -> str:
        return self.words.read_text(errors="replace")

    def status(self) -> Mapping[str, Any]:
        status: Mapping[str, Any] = json.loads(self.run("status", "--json").stdout)
        return status

    def status_when_well(self) -> Mapping[str, Any]:
        """Wait until every service answers `status` in time: on a busy machine one may just be slow."""
        end = time.monotonic() + START_SECONDS
        while not (status := self.status())["well"]:
            assert time.monotonic() < end, status
        return status

    def pid_of(self, name: str) -> int:
        """Read from the record of `up`, at once: asking `status` takes seconds, in which things go on."""
        record = read_record(self.home)
        assert record is not None, "nothing runs"
        return next(service.pid for service in record.services if service.name == name)

    def assert_nothing_left(self, seen: list[psutil.Process]) -> None:
        """No process that was `seen`, none of this stack, no lock, no record, every port free.

        A killed process is gone a moment later, and Python's resource trackers end by themselves: both are waited for.
        """
        wait_until(lambda: not self._left_of(seen), STOP_SECONDS)
        assert self._left_of(seen) == []
        assert not (self.home / "up.lock").exists()
        assert not (self.home / "up.json").exists()
        assert [path for path in self.home.rglob("*") if path.is_socket()] == []
        for port in PORTS:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", int(self.env[port])))

    def _left_of(self, seen: list[psutil.Process]) -> list[psutil.Process]:
        return [*filter(is_alive, seen), *stack_processes(self.home)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vllm_batch_dagster.cli", *arguments]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody else on the machine is given while this process lives, also between two servers of a
    test on the same one."""
    return list(_held.enter_context(hold_ports(count)))


def write_catalogue(folder: Path) -> Path:
    catalogue = folder / "models.yaml"
    catalogue.write_text("models:\n  - name: tiny\n    path: someone/tiny\n")
    return catalogue


def wait_for(is_true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)
