"""What the machine says of its memory: on which device, how much there is, how much of it is free. Blocking calls."""

import shutil
import subprocess
from dataclasses import dataclass

import psutil

from vllm_batch_dagster.adapters.engine.config import Device

_GIB = 1 << 30
_ASK_SECONDS = 20.0
_QUERY = "--query-gpu=name,driver_version,memory.total,memory.free"


@dataclass(frozen=True, slots=True)
class Hardware:
    """`identity` changes with the device, its driver and the size of its memory. `free_share` is that of the fullest
    GPU, None when unknown; `host_free_gib` the machine's own memory that programs may still take."""

    identity: str
    free_share: float | None
    host_free_gib: float


def look_at_hardware(device: Device) -> Hardware:
    """Ask the machine now. May take a second on a GPU."""
    memory = psutil.virtual_memory()
    host_free = memory.available / _GIB
    if device == "cpu":
        return Hardware(f"cpu, {memory.total / _GIB:.0f} GiB", None, host_free)
    listing = _ask_nvidia()
    return Hardware(_identify(listing), _least_free(listing), host_free)


def _ask_nvidia() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        answer = subprocess.run(
            [program, _QUERY, "--format=csv,noheader,nounits"],
            capture_output=True,
            timeout=_ASK_SECONDS,
            check=False,
            text=True,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def _rows(listing: str) -> list[list[str]]:
    rows = ([cell.strip() for cell in line.split(",")] for line in listing.splitlines())
    return [row for row in rows if len(row) == 4]


def _identify(listing: str) -> str:
    return "; ".join(f"{name}, driver {driver}, {total} MiB" for name, driver, total, _free in _rows(listing)) or "cuda"


def _least_free(listing: str) -> float | None:
    try:
        shares = [float(free) / float(total) for _name, _driver, total, free in _rows(listing)]
    except (ValueError, ZeroDivisionError):
        return None
    return min(shares, default=None)
