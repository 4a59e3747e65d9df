"""Runs outlive the death of their worker, their code server, or both: Dagster's own processes, with our launcher."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from dagster import DagsterInstance

from tests.defs.machine import PATIENCE_SECONDS, Machine
from tests.stack import wait_for
from vllm_batch_dagster.defs.launcher import DEFAULT_MISSES, CheckedRunLauncher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.stop()


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

        wait_for(lambda: statuses(instance) == ["STARTED"], PATIENCE_SECONDS)
        assert worker_pid(instance) in [child.pid for child in psutil.Process(code.pid).children()]
        machine.kill(code)
        checks = machine.health_checks()
        wait_for(lambda: machine.health_checks() > checks + DEFAULT_MISSES, PATIENCE_SECONDS)
        machine.start_code_server()

        wait_for(lambda: statuses(instance) == ["FAILURE", "STARTED"], PATIENCE_SECONDS)
        first, second = reversed(instance.get_runs())
        assert second.parent_run_id == first.run_id


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
        wait_for(
            lambda: any("re-submitting" in str(entry.message) for entry in instance.all_logs(run.run_id)),
            PATIENCE_SECONDS,
        )
        machine.start_code_server()

        wait_for(lambda: statuses(instance) == ["STARTED"], PATIENCE_SECONDS)


def worker_pid(instance: DagsterInstance) -> int:
    """The worker of the only run, as the launcher reads it from the event log."""
    launcher = instance.run_launcher
    assert isinstance(launcher, CheckedRunLauncher)
    started = launcher.worker_start(instance.get_runs()[0])
    assert started is not None
    return started[0]


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
        wait_for(lambda: statuses(instance) == ["STARTED"], PATIENCE_SECONDS)

        worker = worker_pid(instance)
        with machine.without_storage():
            os.kill(worker, signal.SIGKILL)
            wait_for(
                lambda: "Exception in thread grpc-server-cleanup" in machine.log_of(0).read_text(), PATIENCE_SECONDS
            )

        wait_for(lambda: statuses(instance) == ["FAILURE", "STARTED"], PATIENCE_SECONDS)


def statuses(instance: DagsterInstance) -> list[str]:
    """Statuses of all runs, oldest first."""
    return [run.status.value for run in reversed(instance.get_runs())]
