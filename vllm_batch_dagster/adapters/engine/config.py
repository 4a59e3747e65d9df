"""What the operator decides about our own engine, and which device it runs on. Made by the composition root."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of our own engine; durations in seconds, 0 in `max_*` means the default of the device.

    `folder` holds the engine's record, locks, log and the ladder's memory; `start_tries` bounds a climb. `extra_args`
    is written as on a command line and wins over what we pass. `command` replaces `vllm serve` altogether: see
    `launch.plan_launch` for its placeholders.
    """

    folder: Path
    python: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    port: int = 8000
    extra_args: str = ""
    start_seconds: float = 900.0
    restarts: int = 3
    stall_seconds: float = 120.0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    gpu_memory_utilization: float = 0.92
    cpu_kvcache_gib: int = 2
    command: tuple[str, ...] | None = None
    health_seconds: float = 2.0
    start_tries: int = 3


def resolve_device(choice: Literal["auto", "cpu", "cuda"]) -> Device:
    """Return the device to run on; `auto` is cuda where nvidia-smi lists a GPU. May take a second."""
    if choice != "auto":
        return choice
    return "cuda" if _has_nvidia_gpu() else "cpu"


def _has_nvidia_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listing = subprocess.run([program, "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and b"GPU" in listing.stdout
