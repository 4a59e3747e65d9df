"""The run launcher notices a worker that is gone, and only such a one."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.events import EngineEventData
from dagster._core.launcher.base import WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._core.test_utils import create_run_for_test

from tests.defs.machine import write_home
from tests.stack import free_ports
from vllm_batch_dagster.defs import launcher as launching
from vllm_batch_dagster.defs.launcher import PATIENT_MISSES, CheckedRunLauncher, is_running


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
