"""What NVML says of the GPUs that the engine uses. In: device handles. Out: readings for core/gpu_health.py.

The binding is imported, and the driver's library loaded, at the first look. Where there is none, it says so once and
stays out of the way. A device that was there and cannot be read any more is a reading with a problem.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from vllm_batch_dagster.core.gpu_health import GpuReading

T = TypeVar("T")

_log = logging.getLogger(__name__)
_MOST_EVENTS = 16  # per look, so that a storm of them does not hold up the run


@dataclass(frozen=True, slots=True)
class _Device:
    """`events` is NVML's event set in which its XIDs arrive, None where it has no such events."""

    label: str
    handle: Any
    events: Any = None


class NvmlGpus:
    """See Gpus. `own_pids` are the processes of our engine; `visible` is CUDA_VISIBLE_DEVICES, None when it is not set.

    XIDs are seen from the first look on, by this object alone.
    """

    def __init__(self, own_pids: Callable[[], Collection[int]], visible: str | None = None) -> None:
        self._own_pids, self._visible = own_pids, visible
        self._nvml: ModuleType | None = None
        self._devices: Sequence[_Device] = ()
        self._labels: Sequence[str] = ()
        self._is_absent = False

    def read(self) -> Sequence[GpuReading] | None:
        if self._is_absent:
            return None
        try:
            self._open()
        except OSError as error:
            return self._miss(str(error))
        ours = set(self._own_pids())
        readings = [self._read_device(device, ours) for device in self._devices]
        if any(reading.problem for reading in readings):
            self._close()
        return readings or None

    def _miss(self, why: str) -> Sequence[GpuReading] | None:
        """NVML does not answer: no GPU if it never did, else every device that there was has a problem."""
        if self._labels:
            return [GpuReading(label, problem=why) for label in self._labels]
        self._is_absent = True
        _log.warning("the GPU health gate is off, because NVML is not there: %s", why)
        return None

    def _open(self) -> None:
        """Load NVML and find the devices, unless that is done. Raises OSError when NVML or a device is not there."""
        if self._devices:
            return
        import pynvml  # type: ignore[import-untyped]

        try:
            pynvml.nvmlInit()
            self._nvml = pynvml
            self._devices = [self._open_device(pynvml, name) for name in self._names(pynvml)]
        except pynvml.NVMLError as error:
            self._close()
            raise OSError(str(error)) from error
        self._labels = [device.label for device in self._devices]

    def _names(self, nvml: ModuleType) -> Sequence[str]:
        """Return the devices that the engine may use: numbers, or UUIDs that may be shortened."""
        if self._visible is None:
            return [str(index) for index in range(nvml.nvmlDeviceGetCount())]
        return [name for part in self._visible.split(",") if (name := part.strip()) not in ("", "-1")]

    def _open_device(self, nvml: ModuleType, name: str) -> _Device:
        handle = nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else self._by_uuid(nvml, name)
        label = f"GPU {name} ({nvml.nvmlDeviceGetName(handle)})"
        try:
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError:
            events = None  # virtual machines and old devices have none
        return _Device(label, handle, events)

    def _by_uuid(self, nvml: ModuleType, name: str) -> Any:
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if nvml.nvmlDeviceGetUUID(handle).startswith(name):
                return handle
        raise nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)

    def _close(self) -> None:
        """Forget the devices; the next look begins anew, which a driver that was reloaded needs."""
        if self._nvml is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._nvml, self._devices = None, ()

    def _read_device(self, device: _Device, ours: Collection[int]) -> GpuReading:
        nvml = self._nvml
        assert nvml is not None  # opened just now
        try:
            return GpuReading(
                device.label,
                celsius=_known(nvml, lambda: nvml.nvmlDeviceGetTemperature(device.handle, nvml.NVML_TEMPERATURE_GPU)),
                other_memory=_known(nvml, lambda: _other_memory(nvml, device.handle, ours)),
                throttled=_known(nvml, lambda: _is_throttled(nvml, device.handle)),
                ecc_errors=_known(nvml, lambda: _ecc_errors(nvml, device.handle)),
                xids=tuple(_read_xids(nvml, device)),
            )
        except nvml.NVMLError as error:
            lost = getattr(error, "value", None) == nvml.NVML_ERROR_GPU_IS_LOST
            return GpuReading(device.label, problem=str(error), lost=lost)


def _known(nvml: ModuleType, ask: Callable[[], T]) -> T | None:
    """Return the quantity, None on a device or a driver that does not have it."""
    try:
        return ask()
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            return None
        raise


def _other_memory(nvml: ModuleType, handle: Any, ours: Collection[int]) -> float | None:
    """None while our engine runs but cannot be told from the others: in a container, pids are hidden."""
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    mine = [each for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if each.pid in ours]
    if ours and not mine:
        return None
    used = memory.used - sum(each.usedGpuMemory or 0 for each in mine)
    return float(max(0, used) / memory.total) if all(each.usedGpuMemory is not None for each in mine) else None


def _is_throttled(nvml: ModuleType, handle: Any) -> bool:
    """By heat or the power brake. A power limit is how many cards always run, and no fault."""
    bits = nvml.nvmlClocksThrottleReasonHwThermalSlowdown | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    try:
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)  # its name before driver 535
    return bool(reasons & bits)


def _ecc_errors(nvml: ModuleType, handle: Any) -> int:
    return int(
        nvml.nvmlDeviceGetTotalEccErrors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    )


def _read_xids(nvml: ModuleType, device: _Device) -> Iterator[int]:
    for _ in range(_MOST_EVENTS if device.events is not None else 0):
        try:
            yield int(nvml.nvmlEventSetWait(device.events, 0).eventData)
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_TIMEOUT:
                return  # no more of them
            raise


def visible_devices() -> str | None:
    """Return what our engine inherits."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")
