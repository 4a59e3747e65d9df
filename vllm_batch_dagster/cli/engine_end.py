"""Ends the engine of a state folder: in order, or at once for somebody in a hurry. Used by `up` and `down`."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from vllm_batch_dagster.adapters.engine import engine_status, stop_engine
from vllm_batch_dagster.cli.processes import kill_group

POLL_SECONDS = 0.2


def end_engine(folder: Path, is_hurried: Callable[[], bool] = lambda: False) -> str | None:
    """Stop the engine and return its model, None when none ran. When `is_hurried`, its work is cut off."""
    with ThreadPoolExecutor(1) as threads:
        ending = threads.submit(stop_engine, folder)
        while wait([ending], POLL_SECONDS).not_done:
            if is_hurried() and (status := engine_status(folder)):
                kill_group(status.pid)
        return ending.result()
