"""Peak resident memory: VmHWM of processes that stay, and of run workers while they live. Linux only."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from bench.errors import BenchFailed
from bench.sampling import Sampler
from vllm_batch_dagster.cli.processes import run_workers

_POLL_SECONDS = 0.1


def read_peak(status: str) -> float:
    """Return VmHWM in MB (2**20 bytes) from the text of /proc/PID/status. Raises ValueError when it is not there."""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise ValueError("no VmHWM: not a Linux process, or one that has ended")


def peak_of(pid: int) -> float:
    """Return the peak of a living process in MB."""
    return read_peak(Path(f"/proc/{pid}/status").read_text())


def watch_peak(process: "subprocess.Popen[bytes]") -> float:
    """Wait for the end of a process and return its peak in MB; its last 0.1 s may be missed. The `ru_maxrss` of a child
    would not do: it begins with what its parent held."""
    peak = 0.0
    while process.poll() is None:
        with suppress(OSError, ValueError):
            peak = max(peak, peak_of(process.pid))
        time.sleep(_POLL_SECONDS)
    return peak


class WorkerPeaks(Sampler):
    """Notes the peak of every run worker of a code server from `with` on. Its last 0.1 s may be missed."""

    def __init__(self, code_server: int) -> None:
        self._code_server = code_server
        self._foreign: set[int] = set()
        self._peaks: dict[int, tuple[float, float]] = {}
        self._known: dict[int, psutil.Process] = {}
        super().__init__("worker peaks", _POLL_SECONDS)

    def __enter__(self) -> Self:
        # A worker of the batch before may still be on its way out.
        self._foreign = {worker.pid for worker in run_workers(self._code_server)}
        return super().__enter__()

    def in_order(self, expected: int) -> list[float]:
        """Return the peaks in MB in the order in which the workers began. Raises BenchFailed for another number."""
        if len(self._peaks) != expected:
            raise BenchFailed(f"saw {len(self._peaks)} run workers instead of {expected}")
        return [peak for _began, peak in sorted(self._peaks.values())]

    def sample(self) -> None:
        for worker in run_workers(self._code_server):
            if worker.pid not in self._foreign:
                self._known.setdefault(worker.pid, worker)
        for pid, worker in list(self._known.items()):
            try:
                self._peaks[pid] = (worker.create_time(), peak_of(pid))
            except (OSError, ValueError, psutil.Error):
                del self._known[pid]  # it has ended; its last peak stays
