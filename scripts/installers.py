"""Install locked packages into an environment: with uv where it can be had, with plain pip otherwise.

In: lock files and the machine's own pip settings (mirrors, folders of wheels, certificates), which uv does not read and
which are translated for it here. Out: packages in an environment. Called by scripts/environments.py.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from scripts.commands import CommandFailed, SetupError, run, say

BOOTSTRAP = "requirements/bootstrap.txt"
CHOICES = ("auto", "uv", "pip")
# pip's name of a setting: the variable in which uv reads the same. Lists are separated by spaces in both.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
# Sections of pip's settings that hold for an install, weakest first.
SECTIONS = ("global", "install", ":env:")
# pip takes the best file of all indexes; uv would stop at the first index that knows the name.
UV_BASE = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
PIP_BASE = {"PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_PROGRESS_BAR": "off"}


def parse_pip_settings(listing: str) -> dict[str, str]:
    """Read `pip config list`: the settings that hold for an install, the strongest section winning."""
    ranked: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        name, separator, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if not separator or section not in SECTIONS or not value.startswith(("'", '"')):
            continue
        rank = SECTIONS.index(section)
        if rank >= ranked.get(option, (-1, ""))[0]:
            ranked[option] = (rank, " ".join(str(ast.literal_eval(value)).split()))
    return {option: value for option, (_, value) in ranked.items()}


def translate_to_uv(settings: Mapping[str, str]) -> dict[str, str]:
    """pip's settings as the environment variables that uv reads."""
    translated = {UV_NAMES[option]: value for option, value in settings.items() if option in UV_NAMES}
    if settings.get("find-links"):
        translated["UV_FIND_LINKS"] = ",".join(settings["find-links"].split())
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        translated["UV_NO_INDEX"] = "1"
    return translated


class Pip:
    """Plain pip of the orchestrator environment; it installs into other environments too."""

    name = "pip"

    def __init__(self, home: Path) -> None:
        self._pip = [str(home / "bin" / "python"), "-m", "pip"]

    def install(self, environment: Path, arguments: Sequence[str], extra_index: str | None = None) -> None:
        """Install into an environment, without dependencies: the locks are complete. Raises CommandFailed."""
        extra = ["--extra-index-url", extra_index] if extra_index else []
        target = ["--python", str(environment / "bin" / "python")]
        run([*self._pip, *target, "install", "--no-deps", *extra, *arguments], PIP_BASE)

    def download(self, into: Path, arguments: Sequence[str]) -> None:
        """Fetch wheels, and nothing that would have to be built, into a folder. Raises CommandFailed."""
        run([*self._pip, "download", "--no-deps", "--only-binary", ":all:", "-d", str(into), *arguments], PIP_BASE)

    def read_settings(self) -> dict[str, str]:
        """The machine's own pip settings. Raises CommandFailed."""
        return parse_pip_settings(run([*self._pip, "config", "list"], {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}))


class Uv:
    """uv of the orchestrator environment, with the machine's pip settings."""

    name = "uv"

    def __init__(self, home: Path, settings: Mapping[str, str]) -> None:
        self._uv = str(home / "bin" / "uv")
        # What the user set for uv himself is stronger than what was said to pip.
        self.variables = {**UV_BASE, **translate_to_uv(settings)}
        self.variables = {name: os.environ.get(name) or value for name, value in self.variables.items()}

    def install(self, environment: Path, arguments: Sequence[str], extra_index: str | None = None) -> None:
        """Install into an environment, without dependencies: the locks are complete. Raises CommandFailed.

        Compiles to bytecode, as pip does: the engine's three processes start in 25 s then and in 44 s without.
        """
        extra = ["--index", extra_index] if extra_index else []
        target = ["--python", str(environment / "bin" / "python")]
        self.run(["pip", "install", *target, "--no-deps", "--compile-bytecode", *extra, *arguments])

    def run(self, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
        """Any command of uv with the machine's settings. Raises CommandFailed."""
        return run([self._uv, *arguments], {**self.variables, **(variables or {})})


def get_installers(home: Path, choice: str) -> list[Uv | Pip]:
    """The installers to try in turn. Raises SetupError when uv was asked for and cannot be had."""
    pip = Pip(home)
    if choice == "pip":
        return [pip]
    try:
        pip.install(home, ["-r", BOOTSTRAP])
        uv = Uv(home, pip.read_settings())
    except CommandFailed as failure:
        if choice == "uv":
            raise SetupError(
                f"uv could not be installed ({failure.last_line}).",
                "Check the network and `pip config list`, or use plain pip: `make setup INSTALLER=pip`.",
            ) from failure
        say(f"  uv could not be installed ({failure.last_line}); going on with pip, which takes longer.")
        return [pip]
    return [uv] if choice == "uv" else [uv, pip]


def use_first_that_works(installers: Iterable[Uv | Pip], action: Callable[[Uv | Pip], None]) -> None:
    """Do something with the first installer; when it fails, with the next. Raises the last one's CommandFailed."""
    remaining = list(installers)
    while True:
        installer = remaining.pop(0)
        try:
            return action(installer)
        except CommandFailed as failure:
            if not remaining:
                raise
            say(f"  {installer.name} failed ({failure.last_line}); trying again with {remaining[0].name}.")
