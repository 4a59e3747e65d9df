"""`vllm-batch down`: stops what runs on this state folder, also what an `up` that was killed has left. Idempotent."""

import os
import signal

import psutil
import typer

from vllm_batch_dagster.cli.engine_end import end_engine
from vllm_batch_dagster.cli.processes import (
    is_alive,
    kill_processes,
    stack_processes,
    stop_processes,
    wait_until,
)
from vllm_batch_dagster.cli.state_folder import holder_pid
from vllm_batch_dagster.settings import load_settings

# `up` gives its services 15 s each at worst, runs 20 s and the engine 30 s.
UP_SECONDS = 100.0
LEFTOVER_SECONDS = 10.0


def down() -> None:
    """Stop the stack of this state folder and its engine. Does nothing when none runs."""
    settings = load_settings()
    home = settings.vllm_batch_home
    words = [f"stopped `up`, pid {pid}"] if (pid := holder_pid(home)) else []
    if pid:
        _stop_up(pid)
    left = stack_processes(home)
    if left:
        stop_processes(left, LEFTOVER_SECONDS)
        words.append(f"stopped {len(left)} processes that were left over")
    if model := end_engine(settings.engine_folder):
        words.append(f"stopped the engine of {model}")
    typer.echo("; ".join(words).capitalize() + "." if words else f"Nothing runs on {home}.")


def _stop_up(pid: int) -> None:
    try:
        process = psutil.Process(pid)
        os.kill(pid, signal.SIGTERM)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return
    if not wait_until(lambda: not is_alive(process), UP_SECONDS):
        kill_processes([process])
