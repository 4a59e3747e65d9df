"""Which process of a stack a kill hits, and what the kills cost by the engine's witness log. Used by `kills`."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from bench.stack import Stack
from vllm_batch_dagster.adapters.engine import engine_status
from vllm_batch_dagster.cli.processes import is_alive, run_workers

CORE, WORKER = "EngineCore", "Worker"


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: unix seconds, lines that had reached the engine, and how long until the next one did."""

    what: str
    at: float
    asked: int
    recovered: float


def find_run(stack: Stack) -> int | None:
    """Return the pid of a run's process, None when no run is at work."""
    return next((worker.pid for worker in run_workers(stack.pid_of("code")) if is_alive(worker)), None)


def find_engine(name: str) -> Callable[[Stack], int | None]:
    """Return a look-up of the process of our own engine whose name holds `name`; empty: its API server."""

    def find(stack: Stack) -> int | None:
        status = engine_status(stack.settings.engine_folder)
        if status is None:
            return None
        with suppress(psutil.Error):
            below = psutil.Process(status.pid).children(recursive=True)
            return next((each.pid for each in below if name in _words(each)), None) if name else status.pid
        return None

    return find


def _words(process: psutil.Process) -> str:
    return " ".join((process.name(), *process.cmdline()[-1:]))


VICTIMS: Mapping[str, Callable[[Stack], int | None]] = {
    "run": find_run,
    "engine API": find_engine(""),
    "engine core": find_engine(CORE),
    "engine worker": find_engine(WORKER),
}


def count_redone(asked: Sequence[str], kills: Sequence[int]) -> list[int]:
    """Return for each kill how many lines were sent again because of it. `asked` are the lines in the order in which
    they reached the engine, `kills` how many had done so at each kill.

    A line that comes again is counted at the first kill after it came last: that one met it in flight. When it comes
    says nothing: two kills in quick succession are both paid for after the second.
    """
    redone = [0] * len(kills)
    last: dict[str, int] = {}
    for place, line in enumerate(asked):
        if line in last and (kill := bisect_right(kills, last[line])) < len(kills):
            redone[kill] += 1
        last[line] = place
    return redone
