"""Finds and ends the processes of a stack, also those whose parents are gone. Used by `up`, `down` and `status`.

Every process of a stack, however deep, has the state folder in its environment (STACK_VARIABLE).
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

STACK_VARIABLE = "VLLM_BATCH_STACK"
POLL_SECONDS = 0.05
KILL_SECONDS = 10.0


def stack_processes(home: Path) -> list[psutil.Process]:
    """Return the living processes that were started for the stack of `home`, ourselves excepted."""
    return [p for p in psutil.process_iter() if p.pid != os.getpid() and _belongs(p, home)]


def _belongs(process: psutil.Process, home: Path) -> bool:
    try:
        return process.environ().get(STACK_VARIABLE) == str(home) and is_alive(process)
    except (psutil.Error, OSError):
        return False


def is_alive(process: psutil.Process) -> bool:
    """True while the process runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def run_workers(code_server: int) -> list[psutil.Process]:
    """Return the Dagster run workers among the children of the code server's pid.

    Dagster spawns them with multiprocessing. The code server waits for them before it ends, so they go first.
    """
    try:
        children = psutil.Process(code_server).children()
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if _is_spawned(child)]


def orphaned_workers(home: Path, code_servers: Iterable[int]) -> list[psutil.Process]:
    """Return the run workers of the stack whose code server, one of these pids, is dead. They go on in its group."""
    groups = frozenset(code_servers)
    return [process for process in stack_processes(home) if _group_of(process) in groups and _is_spawned(process)]


def _group_of(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except OSError:
        return 0


def _is_spawned(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.spawn" in part for part in process.cmdline())
    except psutil.Error:
        return False


def stop_processes(
    processes: Iterable[psutil.Process], grace: float, is_hurried: Callable[[], bool] = lambda: False
) -> None:
    """Send SIGTERM, wait at most `grace` seconds or until `is_hurried`, then SIGKILL what is left."""
    alive = list(processes)
    for process in alive:
        _send(process, signal.SIGTERM)
    wait_until(lambda: not any(map(is_alive, alive)) or is_hurried(), grace)
    kill_processes(alive)


def kill_processes(processes: Iterable[psutil.Process]) -> None:
    """Kill those that still run and wait until they are gone."""
    alive = [process for process in processes if is_alive(process)]
    for process in alive:
        _send(process, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, alive)), KILL_SECONDS)


def kill_group(group: int) -> None:
    """Kill what is left of a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def wait_until(is_done: Callable[[], bool], seconds: float) -> bool:
    """Poll until `is_done` or the time is over; returns whether it is done."""
    end = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
