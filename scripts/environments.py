"""Make a virtual environment from its locks, once: a stamp inside it says what it was made from.

In: an interpreter, lock files, installers. Out: an environment folder that is complete, or has no stamp and is built
anew by the next set-up. Called by scripts/setup.py and scripts/engine_environment.py.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from scripts.commands import ROOT, SetupError, run
from scripts.interpreters import Interpreter, choose_interpreter

STAMP_FILE = ".setup-stamp"
PROJECT_STAMP_FILE = ".setup-project-stamp"
ORCHESTRATOR_LOCKS = ("requirements/orchestrator.txt", "requirements/dev.txt")
RETRY = "Check the network, the free disk space and `pip config list`, then run `make setup` again."


def compute_stamp(label: str, files: Iterable[Path]) -> str:
    """Identity of an environment: a label (what it is for, its Python) and a hash of the content of its locks."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes() + b"\0")
    return f"{label} {digest.hexdigest()}"


def has_stamp(environment: Path, stamp: str, name: str = STAMP_FILE) -> bool:
    """Whether the environment is whole and was made from exactly this."""
    path = environment / name
    return (environment / "bin" / "python").exists() and path.is_file() and path.read_text().strip() == stamp


def write_stamp(environment: Path, stamp: str, name: str = STAMP_FILE) -> None:
    """Declare the environment whole."""
    (environment / name).write_text(stamp + "\n")


def read_interpreter(environment: Path) -> Interpreter | None:
    """The Python of an existing environment, read from its pyvenv.cfg; None when there is none that could run."""
    python, config = environment / "bin" / "python", environment / "pyvenv.cfg"
    if not python.exists() or not config.is_file():
        return None
    found = re.search(r"^version(?:_info)?\s*=\s*(\d+)\.(\d+)\.(\d+)", config.read_text(), re.MULTILINE)
    return Interpreter(str(python), (int(found[1]), int(found[2]), int(found[3]))) if found else None


def resolve_interpreter(environment: Path, wanted: str | None, variable: str, running_first: bool) -> Interpreter:
    """The Python for an environment: the one it has, unless the user names another. Raises SetupError."""
    existing = read_interpreter(environment)
    if wanted is None and existing is not None and existing.supported:
        return existing
    return choose_interpreter(wanted, variable, running_first)


def make_ready(environment: Path, python: Interpreter, label: str, with_pip: bool) -> None:
    """Create the environment, or keep a whole one with the same label, and take its stamp away while it is changed.

    An environment without a stamp was cut in the middle of an installation and is not trusted; one with another label
    has another Python or another build of vLLM, of which nothing may stay. Raises CommandFailed.
    """
    keep = read_interpreter(environment) is not None and read_label(environment) == label
    for name in (STAMP_FILE, PROJECT_STAMP_FILE):
        (environment / name).unlink(missing_ok=True)
    if keep:
        return
    refuse_foreign_folder(environment)
    run([python.path, "-m", "venv", "--clear", *([] if with_pip else ["--without-pip"]), str(environment)])


def read_label(environment: Path) -> str | None:
    """The label in the stamp of an environment, None without a stamp."""
    path = environment / STAMP_FILE
    return path.read_text().strip().rpartition(" ")[0] if path.is_file() else None


def refuse_foreign_folder(environment: Path) -> None:
    """`venv --clear` empties the folder: never one that is something else. Raises SetupError."""
    if environment.is_dir() and any(environment.iterdir()) and not (environment / "pyvenv.cfg").is_file():
        raise SetupError(
            f"{environment} exists and is not a Python environment.",
            "Name another folder with VENV= or ENGINE_VENV=, or move that one away.",
        )


def check_disk(folder: Path, gigabytes: float) -> None:
    """Fail before the download, not at its end. Raises SetupError."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < gigabytes:
        raise SetupError(
            f"{folder} needs {gigabytes:.0f} GB of disk and {free:.1f} GB are free.",
            "Free some space, or name a folder on another disk with VENV=, ENGINE_VENV= or MODEL_CACHE=.",
        )


def show(path: Path) -> str:
    """A path as the reader knows it: relative to the project where it is inside."""
    try:
        return str(path.relative_to(ROOT))
    except ValueError:
        return str(path)
