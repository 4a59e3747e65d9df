"""What of the machine's state pauses everything: the hours, the free space of the disk, the health of the GPUs.

Each is a Watch that the board of stages/pausing.py looks at. They decide nothing about batches.
"""

import time
from collections.abc import Callable, Sequence
from datetime import datetime

from vllm_batch_dagster.core.dispatch_hours import HourRange, are_open, next_opening
from vllm_batch_dagster.core.gpu_health import Finding, GpuLimits, GpuMemory, Gpus, judge, remember
from vllm_batch_dagster.core.pauses import ALL, LATCHED, Pause, PauseCause

GPU_LOOK_SECONDS = 5.0
_MIB = 1 << 20


class ScheduleWatch:
    """Outside of `hours` nothing is sent. `to_local` turns unix seconds into the local time that they mean."""

    cause = PauseCause.SCHEDULE

    def __init__(self, hours: Sequence[HourRange], to_local: Callable[[float], datetime], text: str) -> None:
        self._hours, self._to_local, self._text = hours, to_local, text

    def look(self, standing: Pause | None, now: float) -> Pause | None:
        local = self._to_local(now)
        if are_open(self._hours, local):
            return None
        until = int(next_opening(self._hours, local).timestamp())
        reason = f"it is outside of DISPATCH_HOURS ({self._text})"
        return Pause(ALL, self.cause, reason, standing.since if standing else int(now), until)


class DiskWatch:
    """Less than `reserve` bytes free: a journal that finds no room loses answers that cost engine time. `free` raises
    OSError when the disk does not answer, which says nothing about its space."""

    cause = PauseCause.STORAGE

    def __init__(self, free: Callable[[], int], reserve: int, place: str) -> None:
        self._free, self._reserve, self._place = free, reserve, place

    def look(self, standing: Pause | None, now: float) -> Pause | None:
        try:
            free = self._free()
        except OSError:
            return None
        if free >= self._reserve:
            return None
        reason = (
            f"only {free // _MIB} MiB are free in {self._place}, less than DISK_RESERVE_BYTES "
            f"({self._reserve // _MIB} MiB): free some space"
        )
        return Pause(ALL, self.cause, reason, standing.since if standing else int(now))


class GpuWatch:
    """The health gate. Looks at the devices every `every` seconds at most; between looks the last verdict holds."""

    cause = PauseCause.GPU

    def __init__(
        self,
        gpus: Gpus,
        limits: GpuLimits,
        every: float = GPU_LOOK_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gpus, self._limits, self._every, self._monotonic = gpus, limits, every, monotonic
        self._memory = GpuMemory()
        self._next_look = float("-inf")

    def look(self, standing: Pause | None, now: float) -> Pause | None:
        if self._monotonic() < self._next_look:
            return standing
        self._next_look = self._monotonic() + self._every
        readings = self._gpus.read()
        if readings is None:
            return standing if standing is not None and standing.mark == LATCHED else None
        self._memory = remember(self._memory, readings)
        finding = judge(readings, self._memory, self._limits, paused=standing is not None)
        return self._pause(finding, standing, now)

    def _pause(self, finding: Finding | None, standing: Pause | None, now: float) -> Pause | None:
        if standing is not None and standing.mark == LATCHED:
            return standing
        if finding is None:
            return None
        if standing is not None and not finding.latched:
            return standing  # the words of the first look stay: a temperature that moves is no news
        since = standing.since if standing else int(now)
        return Pause(ALL, self.cause, finding.reason, since, mark=LATCHED if finding.latched else "")
