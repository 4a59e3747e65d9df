"""What `recovery` watches: the journals of a batch, the record of an engine, a witness file. Times are unix seconds."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from bench.errors import BenchFailed
from vllm_batch_dagster.adapters.engine import EngineStatus, engine_status

T = TypeVar("T")

_LOOK_SECONDS = 0.02
_QUIET_SECONDS = 1.0


def journal_bytes(batches: Path, batch_id: str) -> int:
    """Return how many bytes of answers are on disk for a batch."""
    return sum(path.stat().st_size for path in (batches / batch_id / "journal").rglob("*.jsonl"))


def until(look: Callable[[], T | None], seconds: float, what: str) -> T:
    """Return what `look` finds. Raises BenchFailed when it finds nothing in time."""
    end = time.monotonic() + seconds
    while (found := look()) is None:
        if time.monotonic() > end:
            raise BenchFailed(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(_LOOK_SECONDS)
    return found


def next_engine(folder: Path, old: EngineStatus, seconds: float) -> tuple[EngineStatus, float]:
    """Wait for the engine that replaces `old`; returns it and when it was ready."""

    def look() -> EngineStatus | None:
        status = engine_status(folder)
        return status if status is not None and status.pid != old.pid and status.state == "ready" else None

    status = until(look, seconds, "the restart of the engine")
    return status, time.time()


def first_growth(size: Callable[[], int], seconds: float, what: str) -> float:
    """Return when `size` first grew from what it is now."""
    before = size()
    until(lambda: size() > before or None, seconds, what)
    return time.time()


def first_after_quiet(size: Callable[[], int], seconds: float, what: str) -> float:
    """Return when `size` grows after it has stood still: what was on its way at a kill does not count."""
    before, since = size(), time.monotonic()
    while time.monotonic() < since + _QUIET_SECONDS:
        time.sleep(_LOOK_SECONDS)
        if (now := size()) != before:
            before, since = now, time.monotonic()
    return first_growth(size, seconds, what)


def find_core(engine: int) -> psutil.Process:
    """Return vLLM's EngineCore among the children of the API server. Raises BenchFailed."""
    for child in psutil.Process(engine).children(recursive=True):
        if "EngineCore" in child.name() + "".join(child.cmdline()):
            return child
    raise BenchFailed(f"the engine {engine} has no EngineCore")
