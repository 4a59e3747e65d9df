"""Real Dagster processes on a home of their own, whose graph is one run that never ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.stack import free_ports, wait_for
from vllm_batch_dagster.cli.readiness import accepts_connections
from vllm_batch_dagster.settings import PROJECT_ROOT

PATIENCE_SECONDS = 280

GRAPH = """
import time
import dagster as dg

@dg.asset
def endless() -> None:
    while True:
        time.sleep(0.2)

defs = dg.Definitions(
    assets=[endless],
    jobs=[dg.define_asset_job("endless_job", [endless], executor_def=dg.in_process_executor)],
)
"""


def write_home(folder: Path) -> Path:
    home = folder / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_bytes((PROJECT_ROOT / "dagster.yaml").read_bytes())
    return home


class Machine:
    """Real Dagster processes on one home: what `vllm-batch up` starts, without it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports(1)[0]
        self.graph = folder / "endless_graph.py"
        self.graph.write_text(GRAPH)
        self.env = {
            **os.environ,
            "DAGSTER_HOME": str(write_home(folder)),
            "CODE_SERVER_HOST": "127.0.0.1",
            "CODE_SERVER_PORT": str(self.port),
            "PYTHONPATH": str(PROJECT_ROOT),
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = self.log_of(len(self.processes)).open("wb")
        command = [sys.executable, "-m", *arguments]
        process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self.processes.append(process)
        return process

    def log_of(self, number: int) -> Path:
        """What the process said that was started as the `number`-th, from 0."""
        return self.folder / f"{number}.log"

    def health_checks(self) -> int:
        """How often the daemon, the second process, has looked after a run."""
        return self.log_of(1).read_text().count("Checking run")

    def start_code_server(self) -> subprocess.Popen[bytes]:
        server = self.start("dagster", "api", "grpc", "-f", str(self.graph), "-h", "127.0.0.1", "-p", str(self.port))
        wait_for(lambda: accepts_connections("127.0.0.1", self.port), PATIENCE_SECONDS)
        return server

    def start_daemon(self) -> subprocess.Popen[bytes]:
        return self.start("dagster._daemon", "run", "-w", str(PROJECT_ROOT / "workspace.yaml"))

    def launch(self) -> subprocess.Popen[bytes]:
        """Ask for a run."""
        return self.start("dagster", "job", "launch", "-w", str(PROJECT_ROOT / "workspace.yaml"), "-j", "endless_job")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL a process and everything in its group: what a crash of the machine does."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    @contextmanager
    def without_storage(self) -> Iterator[None]:
        """Let nobody open a database of Dagster."""
        history = Path(self.env["DAGSTER_HOME"]) / "history"
        away = history.rename(history.with_name("away"))
        history.touch()
        try:
            yield
        finally:
            history.unlink()
            away.rename(history)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                self.kill(process)
