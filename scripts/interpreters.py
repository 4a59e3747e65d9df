"""Find the Python interpreters that the two environments are made from.

In: a name or a path from the user, or nothing. Out: an interpreter that was run once and answered. Looks on PATH and
among the versions that pyenv keeps, because pyenv's own names on PATH answer for the selected versions only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.commands import SetupError

SUPPORTED = ((3, 11), (3, 12), (3, 13))
PROBE_SECONDS = 30
# `_base_executable`: inside an activated environment the real interpreter, not the environment's link to it.
PROBE = "import sys, venv; print(getattr(sys, '_base_executable', '') or sys.executable, *sys.version_info[:3])"


@dataclass(frozen=True)
class Interpreter:
    """A Python that answered: where it is and its version."""

    path: str
    version: tuple[int, int, int]

    @property
    def label(self) -> str:
        """The version as people write it."""
        return ".".join(str(part) for part in self.version)

    @property
    def supported(self) -> bool:
        """Whether the project runs on it."""
        return self.version[:2] in SUPPORTED


def parse_probe(answer: str) -> Interpreter | None:
    """Read the line that PROBE prints; None when it is something else."""
    match = re.fullmatch(r"(.+) (\d+) (\d+) (\d+)", answer.strip())
    if match is None:
        return None
    return Interpreter(match[1], (int(match[2]), int(match[3]), int(match[4])))


def probe(command: str) -> Interpreter | None:
    """Run an interpreter once. None when it is missing, broken, or has no `venv` module."""
    try:
        answer = subprocess.run(
            [command, "-c", PROBE], capture_output=True, encoding="utf-8", timeout=PROBE_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_probe(answer.stdout)


def list_pyenv(name: str) -> list[str]:
    """The interpreters called `name` among pyenv's versions, newest first."""
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [path for path in versions.glob(f"*/bin/{name}") if os.access(path, os.X_OK)]
    return [str(path) for path in sorted(found, key=read_folder_version, reverse=True)]


def read_folder_version(path: Path) -> list[int]:
    """Order of pyenv's folders: 3.11.10 is newer than 3.11.9."""
    return [int(part) for part in re.findall(r"\d+", path.parent.parent.name)]


def list_candidates(name: str) -> Iterator[str]:
    """Where an interpreter of this name or path could be, best first."""
    on_path = shutil.which(name)
    if on_path:
        yield on_path
    if os.sep not in name:
        yield from list_pyenv(name)


def find_supported(names: Iterable[str]) -> Interpreter | None:
    """The first interpreter of these names that answers and is supported."""
    for name in names:
        for candidate in list_candidates(name):
            found = probe(candidate)
            if found is not None and found.supported:
                return found
    return None


def list_names() -> list[str]:
    """The names of the supported interpreters, in the order of preference (the CPU engine has 3.11 everywhere)."""
    return [f"python{major}.{minor}" for major, minor in SUPPORTED]


def choose_interpreter(wanted: str | None, variable: str, running_first: bool) -> Interpreter:
    """The interpreter that the user named, or the best one of the machine. Raises SetupError.

    `variable` is what the user sets to name another one; it appears in the sentence.
    """
    running = [sys.executable]
    names = [wanted] if wanted else sorted_names(running, running_first)
    found = find_supported(names)
    if found is None:
        raise SetupError(
            f"No Python {describe_supported()} was found: {', '.join(names)} is missing, broken or another version.",
            f"Install one (Debian: `apt-get install python3.11 python3.11-venv`; pyenv: `pyenv install 3.11`) or name "
            f"it: `make setup {variable}=/path/to/python3.11`.",
        )
    return found


def sorted_names(running: Sequence[str], running_first: bool) -> list[str]:
    """The running interpreter before or after the names of the supported ones."""
    return [*running, *list_names()] if running_first else [*list_names(), *running]


def describe_supported() -> str:
    """The supported versions in words."""
    first, last = SUPPORTED[0], SUPPORTED[-1]
    return f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
