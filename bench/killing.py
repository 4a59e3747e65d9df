"""Which process of a stack a kill hits, and what the kills cost by the engine's witness log. Used by `kills`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

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
    """Return how many lines were sent again between each kill and the next. `asked` are the lines in the order in which
    they reached the engine, `kills` how many had done so at each kill."""
    seen: set[str] = set(asked[: kills[0]]) if kills else set()
    redone = []
    for begin, end in pairwise([*kills, len(asked)]):
        again = 0
        for line in asked[begin:end]:
            again += line in seen
            seen.add(line)
        redone.append(again)
    return redone


def most_per_kill(redone: Sequence[int]) -> float:
    """Return the most lines that a kill cost. One that comes before the lines of the last one were sent again pays for
    both, so two in a row are looked at together, and halved."""
    if len(redone) < 2:
        return float(max(redone, default=0))
    return max(first + second for first, second in pairwise(redone)) / 2
