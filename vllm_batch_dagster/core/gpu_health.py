"""Decides from readings of the GPUs whether requests may be sent to them. Two thresholds per quantity, fail-closed.

In: what NVML says of each device that the engine uses. Out: why they must rest, or nothing. Above the upper threshold a
pause begins, below the lower one it ends; between them nothing changes. A device that cannot be read is not well.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Errors of the program that ran, not of the device: NVIDIA's own device plugin ignores the same ones.
APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 109})


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One look at one device; None where it does not know the quantity. `other_memory` is the share (0 to 1) of its
    memory that is neither free nor our engine's, `throttled` a slow-down by heat or by the power brake, `ecc_errors`
    the uncorrectable ones since the driver was loaded, `xids` what happened since the last look. With a `problem` it
    could not be read; `lost` says that it has left the bus."""

    device: str
    celsius: int | None = None
    other_memory: float | None = None
    throttled: bool | None = None
    ecc_errors: int | None = None
    xids: tuple[int, ...] = ()
    problem: str = ""
    lost: bool = False


class Gpus(Protocol):
    """The devices that the engine uses."""

    def read(self) -> Sequence[GpuReading] | None:
        """Look at all of them, in milliseconds. None where there is nothing to look at. Raises nothing."""


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """Upper and lower thresholds. A pause begins when a device was slowed down in `throttled_looks` looks in a row, or
    could not be read in `misses`."""

    pause_celsius: int = 88
    resume_celsius: int = 78
    pause_other_memory: float = 0.2
    resume_other_memory: float = 0.16
    throttled_looks: int = 10
    ecc_errors: int = 0
    misses: int = 3


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """What has to be remembered between looks: per device, looks in a row."""

    unreadable: Mapping[str, int] = field(default_factory=dict)
    throttled: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a device must rest. A `latched` one ends only when a person says so."""

    reason: str
    latched: bool = False


def remember(memory: GpuMemory, readings: Sequence[GpuReading]) -> GpuMemory:
    """Return the memory after one more look."""
    return GpuMemory(
        unreadable={each.device: _count(memory.unreadable, each, bool(each.problem)) for each in readings},
        throttled={each.device: _count(memory.throttled, each, bool(each.throttled)) for each in readings},
    )


def _count(before: Mapping[str, int], reading: GpuReading, again: bool) -> int:
    return before.get(reading.device, 0) + 1 if again else 0


def judge(readings: Iterable[GpuReading], memory: GpuMemory, limits: GpuLimits, *, paused: bool) -> Finding | None:
    """Return why the devices must rest, None when all are well. `paused` chooses the lower thresholds; `memory` has
    taken in these readings."""
    findings = [finding for each in readings for finding in _faults(each, memory, limits, paused)]
    return min(findings, key=lambda finding: not finding.latched, default=None)


def _faults(reading: GpuReading, memory: GpuMemory, limits: GpuLimits, paused: bool) -> Iterator[Finding]:
    for xid in reading.xids:
        if xid not in APPLICATION_XIDS:
            yield Finding(
                f"{reading.device} reported the critical error XID {xid}; check it (dmesg, nvidia-smi), then run "
                "`vllm-batch resume`",
                latched=True,
            )
    yield from (Finding(text) for text in _unreadable(reading, memory, limits, paused))
    yield from (Finding(f"{reading.device} {text}") for text in _exceeded(reading, memory, limits, paused))


def _unreadable(reading: GpuReading, memory: GpuMemory, limits: GpuLimits, paused: bool) -> Iterator[str]:
    if reading.lost:
        yield f"{reading.device} is lost: {reading.problem}; the machine must be restarted"
    elif reading.problem and (paused or memory.unreadable.get(reading.device, 0) >= limits.misses):
        yield f"{reading.device} cannot be read: {reading.problem}"


def _exceeded(reading: GpuReading, memory: GpuMemory, limits: GpuLimits, paused: bool) -> Iterator[str]:
    hottest = limits.resume_celsius if paused else limits.pause_celsius
    if reading.celsius is not None and reading.celsius >= hottest:
        yield f"is at {reading.celsius} °C; {_until(f'{limits.resume_celsius} °C', paused)}"
    most = limits.resume_other_memory if paused else limits.pause_other_memory
    if reading.other_memory is not None and reading.other_memory >= most:
        share = f"{reading.other_memory:.0%} of its memory taken by other programs"
        yield f"has {share}; {_until(f'{limits.resume_other_memory:.0%}', paused)}"
    looks = 1 if paused else limits.throttled_looks
    if memory.throttled.get(reading.device, 0) >= looks:
        yield "is slowed down by heat or by the power brake"
    if reading.ecc_errors is not None and reading.ecc_errors > limits.ecc_errors:
        yield (
            f"has {reading.ecc_errors} uncorrectable ECC errors since its driver was loaded; reset it, or raise "
            "GPU_MAX_ECC_ERRORS"
        )


def _until(threshold: str, paused: bool) -> str:
    return f"{'still waiting' if paused else 'waiting'} until it is below {threshold}"
