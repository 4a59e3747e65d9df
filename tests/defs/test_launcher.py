"""The run launcher notices a worker that is gone, and only such a one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.events import EngineEventData
from dagster._core.launcher.base import WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._core.test_utils import create_run_for_test

from tests.stack import free_ports
from vllm_batch_dagster.defs import launcher as launching
from vllm_batch_dagster.defs.launcher import PATIENT_MISSES, CheckedRunLauncher, is_running
from vllm_batch_dagster.settings import PROJECT_ROOT

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


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def launcher(instance: DagsterInstance) -> CheckedRunLauncher:
    launcher = CheckedRunLauncher(misses=2)
    launcher.register_instance(instance)
    return launcher


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool | None], None]:
    """Let the code server of every run claim it or not; None: it does not answer."""
    return lambda claim: monkeypatch.setattr(launching, "_ask_server", lambda _run, _address: claim)


def record_run(instance: DagsterInstance, pid: int, host: str = "127.0.0.1", port: int | None = None) -> DagsterRun:
    """A started run whose worker says it is `pid`. Without `port` its code server does not answer."""
    address = json.dumps({"host": host, "port": port or free_ports(1)[0]})
    run: DagsterRun = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags={GRPC_INFO_TAG: address})
    instance.report_engine_event(f"Started process for run (pid: {pid}).", run, EngineEventData.in_process(pid))
    return run


def check(launcher: CheckedRunLauncher, run: DagsterRun) -> WorkerStatus:
    return launcher.check_run_worker_health(run).status


def test_a_living_worker_needs_no_code_server(
    launcher: CheckedRunLauncher, instance: DagsterInstance, worker: subprocess.Popen[bytes]
) -> None:
    run = record_run(instance, worker.pid)
    assert [check(launcher, run) for _ in range(3)] == [WorkerStatus.RUNNING] * 3


def test_a_dead_worker_fails_after_the_misses(
    launcher: CheckedRunLauncher,
    instance: DagsterInstance,
    worker: subprocess.Popen[bytes],
    server: Callable[[bool | None], None],
) -> None:
    server(False)
    run = record_run(instance, worker.pid)
    assert check(launcher, run) is WorkerStatus.RUNNING
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie until the fixture reaps it
    assert [check(launcher, run) for _ in range(2)] == [WorkerStatus.RUNNING, WorkerStatus.FAILED]


def test_a_server_that_is_away_is_waited_for(
    launcher: CheckedRunLauncher, instance: DagsterInstance, server: Callable[[bool | None], None]
) -> None:
    """It died with its worker, and only once it is back does Dagster get the plan of the retry from it."""
    run = record_run(instance, 0)
    assert [check(launcher, run) for _ in range(5)] == [WorkerStatus.RUNNING] * 5
    server(False)
    assert check(launcher, run) is WorkerStatus.FAILED


def test_a_server_that_stays_away_is_not_waited_for_for_ever(
    launcher: CheckedRunLauncher, instance: DagsterInstance
) -> None:
    run = record_run(instance, 0)
    seen = [check(launcher, run) for _ in range(PATIENT_MISSES)]
    assert seen == [WorkerStatus.RUNNING] * (PATIENT_MISSES - 1) + [WorkerStatus.FAILED]


def test_a_sign_of_life_forgives_earlier_misses(
    launcher: CheckedRunLauncher, instance: DagsterInstance, server: Callable[[bool | None], None]
) -> None:
    run = record_run(instance, 0, host="elsewhere.invalid")
    seen = []
    for claim in (False, True, False, False):
        server(claim)
        seen.append(check(launcher, run))
    assert seen == [WorkerStatus.RUNNING] * 3 + [WorkerStatus.FAILED]


def test_a_server_on_this_machine_cannot_claim_a_worker_that_is_gone(
    launcher: CheckedRunLauncher, instance: DagsterInstance, server: Callable[[bool | None], None]
) -> None:
    server(True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        run = record_run(instance, 0, port=listening.getsockname()[1])
        assert [check(launcher, run) for _ in range(2)] == [WorkerStatus.RUNNING, WorkerStatus.FAILED]


def test_a_server_in_another_container_can(
    launcher: CheckedRunLauncher, instance: DagsterInstance, server: Callable[[bool | None], None]
) -> None:
    """It shares our network and not our processes: nobody whom we see listens on its port."""
    server(True)
    run = record_run(instance, 0)
    assert [check(launcher, run) for _ in range(3)] == [WorkerStatus.RUNNING] * 3


def test_a_pid_of_another_machine_says_nothing(
    launcher: CheckedRunLauncher, instance: DagsterInstance, server: Callable[[bool | None], None]
) -> None:
    server(False)
    run = record_run(instance, os.getpid(), host="elsewhere.invalid")
    assert [check(launcher, run) for _ in range(2)] == [WorkerStatus.RUNNING, WorkerStatus.FAILED]


def test_a_pid_that_was_used_again_is_no_worker(worker: subprocess.Popen[bytes]) -> None:
    started = psutil.Process(worker.pid).create_time()
    assert is_running(worker.pid, started_before=started)
    assert not is_running(worker.pid, started_before=started - 3600)


def test_a_run_that_was_never_launched_has_no_worker(launcher: CheckedRunLauncher, instance: DagsterInstance) -> None:
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
    assert [check(launcher, run) for _ in range(2)] == [WorkerStatus.RUNNING, WorkerStatus.FAILED]


def test_the_shipped_settings_load_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = write_home(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with DagsterInstance.get() as instance:
        assert isinstance(instance.run_launcher, CheckedRunLauncher)
        assert instance.run_launcher.supports_check_run_worker_health
        assert instance.run_monitoring_enabled
        assert instance.run_monitoring_max_resume_run_attempts == 0
        assert instance.run_retries_max_retries == 2
        assert not instance.run_retries_retry_on_asset_or_op_failure
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled


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
        wait_for(lambda: answers(self.port))
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


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.stop()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def wait_for(is_true: Callable[[], bool], seconds: float = 280) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_died_with_its_code_server_is_retried(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code server and worker are killed together; the stock launcher leaves such a run STARTED for ever. One that fails
    it before the server is back costs it its retry."""
    monkeypatch.setenv("DAGSTER_HOME", machine.env["DAGSTER_HOME"])
    with DagsterInstance.get() as instance:
        assert instance.get_run_ids() == []
        assert instance.all_instigator_state() == []
        code = machine.start_code_server()
        machine.start_daemon()
        machine.launch()

        wait_for(lambda: statuses(instance) == ["STARTED"])
        assert worker_pid(instance) in [child.pid for child in psutil.Process(code.pid).children()]
        machine.kill(code)
        checks = machine.health_checks()
        wait_for(lambda: machine.health_checks() > checks + launching.DEFAULT_MISSES)
        machine.start_code_server()

        wait_for(lambda: statuses(instance) == ["FAILURE", "STARTED"])
        first, second = reversed(instance.get_runs())
        assert second.parent_run_id == first.run_id


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_due_while_its_code_server_is_away_waits_for_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", machine.env["DAGSTER_HOME"])
    with DagsterInstance.get() as instance:
        code = machine.start_code_server()
        machine.launch().wait()
        assert statuses(instance) == ["QUEUED"]
        machine.kill(code)
        machine.start_daemon()
        (run,) = instance.get_runs()
        wait_for(lambda: any("re-submitting" in str(entry.message) for entry in instance.all_logs(run.run_id)))
        machine.start_code_server()

        wait_for(lambda: statuses(instance) == ["STARTED"])


def worker_pid(instance: DagsterInstance) -> int:
    """The worker of the only run, as the launcher reads it from the event log."""
    launcher = instance.run_launcher
    assert isinstance(launcher, CheckedRunLauncher)
    started = launcher.worker_start(instance.get_runs()[0])
    assert started is not None
    return started[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_retried_whose_code_server_no_longer_looks_after_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage fails for a moment, as on a full disk: the thread that would notice the dead worker ends."""
    monkeypatch.setenv("DAGSTER_HOME", machine.env["DAGSTER_HOME"])
    with DagsterInstance.get() as instance:
        assert instance.get_run_ids() == []
        assert instance.all_instigator_state() == []
        machine.start_code_server()
        machine.start_daemon()
        machine.launch()
        wait_for(lambda: statuses(instance) == ["STARTED"])

        worker = worker_pid(instance)
        with machine.without_storage():
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: "Exception in thread grpc-server-cleanup" in machine.log_of(0).read_text())

        wait_for(lambda: statuses(instance) == ["FAILURE", "STARTED"])


def statuses(instance: DagsterInstance) -> list[str]:
    """Statuses of all runs, oldest first."""
    return [run.status.value for run in reversed(instance.get_runs())]
