"""Facts of the machine and of the versions, for every result."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from vllm_batch_dagster.adapters.engine.config import resolve_device
from vllm_batch_dagster.cli.installation import engine_version
from vllm_batch_dagster.settings import Settings


def describe_machine(settings: Settings) -> dict[str, Any]:
    """Return CPU model, cores, memory, and the versions of vllm, dagster and python."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / (1 << 30)),
        "system": f"{platform.system()} {platform.release()}",
        "device": resolve_device(settings.engine_device),
        "vllm": engine_version(settings.engine_python) or "missing",
        "dagster": version("dagster"),
        "python": platform.python_version(),
        "project": version("vllm-batch-dagster"),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
