"""Resident memory over time of the processes that a batch goes through, and when its first chunk was there."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import psutil

from bench.sampling import Sampler

_POLL_SECONDS = 0.2
_MB = 1 << 20


@dataclass
class Trace:
    """(unix seconds, MB) of one process."""

    samples: list[tuple[float, float]] = field(default_factory=list)

    @property
    def peak(self) -> float:
        """MB."""
        return max((size for _at, size in self.samples), default=0.0)

    def growth_after(self, moment: float) -> float:
        """Return by how many MB the most after `moment` is above the most up to it; 0 when nothing came after."""
        before = max((size for at, size in self.samples if at <= moment), default=0.0)
        after = max((size for at, size in self.samples if at > moment), default=before)
        return max(0.0, after - before)


class MemoryTraces(Sampler):
    """Reads the memory of `pids` and of the newest process that `worker` finds, from `with` on. `has_begun` tells when
    the first chunk is there."""

    def __init__(
        self, pids: Mapping[str, int], worker: Callable[[], psutil.Process | None], has_begun: Callable[[], bool]
    ) -> None:
        self._pids, self._worker, self._has_begun = pids, worker, has_begun
        self.services = {name: Trace() for name in pids}
        self.workers: dict[float, Trace] = {}
        self.first_chunk = 0.0
        super().__init__("memory traces", _POLL_SECONDS)

    def sample(self) -> None:
        now = time.time()
        if not self.first_chunk and self._has_begun():
            self.first_chunk = now
        for name, pid in self._pids.items():
            _note(self.services[name], pid, now)
        if (worker := self._worker()) is not None:
            self._note_worker(worker, now)

    def _note_worker(self, worker: psutil.Process, now: float) -> None:
        try:
            began = worker.create_time()
        except psutil.Error:
            return
        _note(self.workers.setdefault(began, Trace()), worker.pid, now)


def _note(trace: Trace, pid: int, now: float) -> None:
    try:
        trace.samples.append((now, psutil.Process(pid).memory_info().rss / _MB))
    except psutil.Error:
        return  # it has ended
