"""Finding and ending the processes of a stack: real ones, stubborn ones, and those whose parents are gone."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from vllm_batch_dagster.cli.processes import (
    STACK_VARIABLE,
    is_alive,
    kill_processes,
    run_workers,
    stack_processes,
    stop_processes,
    wait_until,
)

SLEEP = "import time; print('up', flush=True); time.sleep(120)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEP
# The parent starts a child in a session of its own, says its pid and ends.
ABANDON = (
    "import subprocess, sys;"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'], start_new_session=True);"
    "print(p.pid, flush=True)"
)
# What Dagster's code server does for a run.
SPAWN = """
import multiprocessing, time
if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(120,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(120)
"""

pytestmark = pytest.mark.timeout(180)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start Python code as a member of the stack of `tmp_path`; it has said its first line."""
    started = []

    def start(code: str, home: Path = tmp_path) -> "subprocess.Popen[str]":
        env = {**os.environ, STACK_VARIABLE: str(home)}
        process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    kill_processes(stack_processes(tmp_path))
    for process in started:
        process.kill()
        process.communicate()


def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def pids(processes: list[psutil.Process]) -> set[int]:
    return {process.pid for process in processes}


def test_only_the_processes_of_this_stack_are_found(start: Start, tmp_path: Path) -> None:
    mine, other = start(SLEEP), start(SLEEP, tmp_path / "other")
    first_line(mine), first_line(other)
    assert pids(stack_processes(tmp_path)) == {mine.pid}


def test_a_child_whose_parents_are_gone_is_found_and_ended(start: Start, tmp_path: Path) -> None:
    parent = start(ABANDON)
    orphan = int(first_line(parent))
    parent.wait()
    (found,) = stack_processes(tmp_path)
    assert found.pid == orphan
    stop_processes([found], grace=30)
    assert not is_alive(found)


def test_a_zombie_does_not_live(start: Start, tmp_path: Path) -> None:
    process = start("print('up')")
    first_line(process)
    found = psutil.Process(process.pid)
    assert wait_until(lambda: found.status() == psutil.STATUS_ZOMBIE, 60)
    assert not is_alive(found)
    assert stack_processes(tmp_path) == []


def test_a_stubborn_process_is_killed_after_the_grace(start: Start) -> None:
    process = start(STUBBORN)
    first_line(process)
    stop_processes([psutil.Process(process.pid)], grace=0.3)
    assert process.wait(60) == -signal.SIGKILL


def test_somebody_in_a_hurry_does_not_wait(start: Start) -> None:
    process = start(STUBBORN)
    first_line(process)
    # A stop that waits would outlast the test.
    stop_processes([psutil.Process(process.pid)], grace=3600, is_hurried=lambda: True)
    assert process.wait(60) == -signal.SIGKILL


def test_a_polite_process_is_not_killed(start: Start) -> None:
    process = start(SLEEP)
    first_line(process)
    stop_processes([psutil.Process(process.pid)], grace=60)
    assert process.wait(60) == -signal.SIGTERM


def test_run_workers_are_the_spawned_children(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SPAWN)
    server = start(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    worker = int(first_line(server))
    assert pids(run_workers(server.pid)) == {worker}


def test_a_code_server_that_is_gone_has_no_workers(start: Start) -> None:
    process = start("pass")
    process.wait()
    assert run_workers(process.pid) == []
