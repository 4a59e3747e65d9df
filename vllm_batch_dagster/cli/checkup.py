"""The single checks of `vllm-batch doctor`. Each looks at one thing, changes nothing and never raises."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_batch_dagster.adapters.engine import engine_status
from vllm_batch_dagster.cli.addresses import describe_conflict, is_free, listening_addresses
from vllm_batch_dagster.cli.installation import engine_version
from vllm_batch_dagster.cli.preflight import describe_missing_engine
from vllm_batch_dagster.cli.state_folder import has_store, holder_pid, make_state_folder
from vllm_batch_dagster.composition import build_catalog, build_store
from vllm_batch_dagster.core.errors import BatchError
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.settings import Settings

Level = Literal["ok", "warn", "fail"]

PYTHONS = ((3, 11), (3, 13))
GIB = 1 << 30
# Uploads, outputs and journals of a few batches; a full disk stops every answer from being journalled.
LOW_DISK_BYTES, FULL_DISK_BYTES = 10 * GIB, GIB
NVIDIA_SECONDS = 20
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. `mend` is empty when there is nothing to do, or when `text` says it."""

    check: str
    level: Level
    text: str
    mend: str = ""


def check_python() -> Finding:
    lowest, highest = PYTHONS
    version = platform.python_version()
    if lowest <= sys.version_info[:2] <= highest:
        return Finding("python", "ok", version)
    return Finding("python", "fail", version, "use Python 3.11, 3.12 or 3.13 and run `make setup` again")


def check_disk(settings: Settings) -> Finding:
    folder = settings.vllm_batch_home
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free at {folder}"
    mend = "free space or set VLLM_BATCH_HOME to a larger disk"
    if free < FULL_DISK_BYTES:
        return Finding("disk", "fail", text, mend)
    return Finding("disk", "warn", text, mend) if free < LOW_DISK_BYTES else Finding("disk", "ok", text)


def check_ports(settings: Settings) -> Iterator[Finding]:
    """One finding per port. Taken by our own running stack is well."""
    is_up = holder_pid(settings.vllm_batch_home) is not None
    for address in listening_addresses(settings):
        name = f"port {address.port}"
        if is_free(address.host, address.port):
            yield Finding(name, "ok", f"free for {address.service}")
        elif is_up:
            yield Finding(name, "ok", f"used by the running stack for {address.service}")
        else:
            yield Finding(name, "fail", *describe_conflict(address))


def check_device() -> Finding:
    """The GPU and its driver where there is one, else what the processor can do."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return check_processor(_cpu_flags())
    try:
        query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("gpu", "fail", f"nvidia-smi does not run: {error}", "mend the NVIDIA driver")
    if answer.returncode != 0 or not answer.stdout.strip():
        words = (answer.stdout + answer.stderr).strip()
        return Finding("gpu", "fail", f"nvidia-smi: {words}", "mend the driver or set ENGINE_DEVICE=cpu")
    return Finding("gpu", "ok", "; ".join(answer.stdout.strip().splitlines()))


def check_processor(flags: frozenset[str]) -> Finding:
    """vLLM's CPU build needs AVX2 and is fast with AVX-512; other architectures have builds of their own."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return Finding("processor", "ok", f"no GPU; {platform.machine()}")
    if "avx512f" in flags:
        return Finding("processor", "ok", "no GPU; AVX-512")
    if "avx2" in flags:
        mend = "expect several times less speed than with AVX-512, or set ENGINE_URL"
        return Finding("processor", "warn", "no GPU; AVX2 without AVX-512", mend)
    return Finding("processor", "fail", "no GPU and no AVX2", "set ENGINE_URL to a vLLM server elsewhere")


def _cpu_flags() -> frozenset[str]:
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split()) for line in lines if line.startswith("flags")), frozenset())


def check_engine_environment(settings: Settings) -> Finding:
    if settings.engine_url:
        return Finding("engine", "ok", f"somebody else's, at {settings.engine_url}")
    version = engine_version(settings.engine_python)
    if version:
        return Finding("engine", "ok", f"vLLM {version} in {settings.engine_python}")
    return Finding("engine", "fail", *describe_missing_engine(settings.engine_python))


def check_running_engine(settings: Settings) -> Finding:
    if settings.engine_url:
        return Finding("running engine", "ok", "none of ours: ENGINE_URL names the servers")
    engine = engine_status(settings.engine_folder)
    if engine is None:
        return Finding("running engine", "ok", "none; it starts with the first batch")
    text = f"{engine.model}, {engine.state}, pid {engine.pid}"
    if engine.state == "not answering":
        return Finding("running engine", "warn", text, f"read {engine.log}; the next run restarts it")
    return Finding("running engine", "ok", text)


def check_models(settings: Settings) -> Iterator[Finding]:
    """The catalogue, then each of its models."""
    try:
        models = build_catalog(settings).all()
    except BatchError as error:
        yield Finding("models", "fail", str(error))
        return
    if not models:
        yield Finding("models", "fail", "the catalogue is empty", "run `make setup` or set MODEL")
    if settings.engine_url:
        yield Finding("models", "ok", "served there: " + ", ".join(model.name for model in models))
        return
    yield from (check_model(model) for model in models)


def check_model(model: Model) -> Finding:
    """A model that is a folder must hold its configuration; a Hugging Face id is loaded on first use."""
    name, folder = f"model {model.name}", Path(model.path)
    if (folder / "config.json").is_file():
        return Finding(name, "ok", str(folder))
    if folder.is_absolute() or folder.exists():
        mend = "run `make setup`, or mend its path in the catalogue"
        return Finding(name, "fail", f"{folder} holds no config.json", mend)
    return Finding(name, "ok", f"{model.path}, from Hugging Face on first use")


def check_state_folder(settings: Settings) -> Finding:
    home = settings.vllm_batch_home
    if not home.exists():
        return Finding("state folder", "ok", f"{home} is made by the first `vllm-batch up`")
    try:
        make_state_folder(home)
    except BatchError as error:
        return Finding("state folder", "fail", str(error))
    return Finding("state folder", "ok", f"{home}: writable, fsync works")


def check_store(settings: Settings) -> Finding:
    """The batch store opens and answers. Opening it brings its schema up to date."""
    where = settings.postgres_host or str(settings.vllm_batch_home)
    if not has_store(settings):
        return Finding("batch store", "ok", "made by the first `vllm-batch up`")
    try:
        count = len(build_store(settings).batches.open())
    except Exception as error:  # noqa: BLE001 - whatever the driver raises, it is the finding
        text = str(error).strip().splitlines()[0]
        return Finding("batch store", "fail", text, "mend the database, or the POSTGRES_* settings that name it")
    return Finding("batch store", "ok", f"{where}: {count} open batches")
