"""Small services for the tests of the supervisor, and signals that touch no process."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_batch_dagster.cli.group_log import GroupLog
from vllm_batch_dagster.cli.processes import STACK_VARIABLE, kill_processes, stack_processes, wait_until
from vllm_batch_dagster.cli.services import Service
from vllm_batch_dagster.cli.signals import StopSignals
from vllm_batch_dagster.cli.supervisor import Supervisor

# For whatever a process does beside us: long, since a machine that others use too may give it no time for a while.
PATIENCE_SECONDS = 120

SLEEP = "import time; print('hello', flush=True); time.sleep(120)"

Stack = Callable[..., Supervisor]


class Signals(StopSignals):
    """Signals that a test raises without touching the process."""

    def raise_one(self) -> None:
        self._count += 1


@contextmanager
def supervising(folder: Path, log: GroupLog, signals: Signals) -> Iterator[Stack]:
    """Yield a maker of supervisors; whatever a test leaves behind is killed."""
    made = []

    def make(*services: Service, on_change: Callable[[Supervisor], None] = lambda _: None) -> Supervisor:
        env = {**os.environ, STACK_VARIABLE: str(folder)}
        made.append(Supervisor(services, env, log, signals, on_change))
        return made[-1]

    yield make
    for supervisor in made:
        supervisor.stop()
    kill_processes(stack_processes(folder))


def service(
    name: str,
    code: str,
    *after: str,
    ready: Callable[[float], bool] = lambda _: True,
    alive: Callable[[], bool] | None = None,
) -> Service:
    return Service(name, ("-c", code), "green", after, ready, alive)


def run_until(supervisor: Supervisor, signals: Signals, is_done: Callable[[], bool]) -> str | None:
    """Run until `is_done`, or it fails, and then send one signal."""

    def watch() -> None:
        try:
            wait_until(is_done, PATIENCE_SECONDS)
        finally:
            signals.raise_one()

    thread = threading.Thread(target=watch)
    thread.start()
    failure = supervisor.run()
    thread.join()
    return failure


def nothing_runs(folder: Path) -> bool:
    """True once no process of the stack is left. Python's resource trackers end by themselves, a moment after."""
    return wait_until(lambda: not stack_processes(folder), PATIENCE_SECONDS)
