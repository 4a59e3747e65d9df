"""The environment that Label Studio runs in, and an empty state folder with all its tables, to be copied.

In: requirements/label-studio.txt, installers. Out: `.venv-label-studio` with the program and, inside, `template`: to
make the tables takes 40 s of processor time, to copy them none. Called by scripts/setup.py.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from scripts.commands import ROOT, SetupError, run, say, step
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

ENVIRONMENT = ".venv-label-studio"
LOCK = "requirements/label-studio.txt"
GIGABYTES = 1.5
# Count it up when the steps of this file change: environments that the old ones made are then built anew.
RECIPE = 1
# Empty, not unset: addresses of reporting services are compiled in.
QUIET = {
    "LABEL_STUDIO_COLLECT_ANALYTICS": "false",
    "LABEL_STUDIO_LATEST_VERSION_CHECK": "false",
    "LABEL_STUDIO_SENTRY_DSN": "",
    "LABEL_STUDIO_FRONTEND_SENTRY_DSN": "",
}


def template_of(environment: Path) -> Path:
    """The state folder that new ones are copied from."""
    return environment / "template"


def state_variables(folder: Path) -> dict[str, str]:
    """The variables that keep all state of Label Studio in `folder`."""
    return {**QUIET, "LABEL_STUDIO_BASE_DATA_DIR": str(folder), "XDG_CONFIG_HOME": str(folder / "xdg")}


def prepare_label_studio(environment: Path, get_installers: Callable[[], list[Uv | Pip]]) -> None:
    """Make the environment, or say that it is up to date. Raises SetupError."""
    python = resolve_interpreter(environment, None, "PYTHON", running_first=True)
    lock = ROOT / LOCK
    label = f"label-studio {RECIPE} {python.label}"
    stamp = compute_stamp(label, [lock])
    if has_stamp(environment, stamp):
        say(f"{show(environment)} is up to date: Label Studio {read_pin(lock)}, Python {python.label}.")
        return
    check_disk(environment, GIGABYTES)
    with step(f"Preparing {show(environment)} with Python {python.label}", RETRY):
        make_ready(environment, python, label, with_pip=False)
    with step(f"Installing Label Studio {read_pin(lock)} into {show(environment)}", RETRY):
        use_first_that_works(get_installers(), lambda installer: installer.install(environment, ["-r", str(lock)]))
    with step("Making the tables of Label Studio", f"Delete {show(environment)} and run this again."):
        make_template(environment)
    write_stamp(environment, stamp)


def read_pin(lock: Path) -> str:
    """The version of Label Studio in its lock. Raises SetupError when the lock has none."""
    found = re.search(r"^label-studio==(\S+)", lock.read_text(), re.MULTILINE)
    if found is None:
        raise SetupError(f"{show(lock)} does not pin label-studio.", "Write the locks again with `make lock`.")
    return found[1]


def make_template(environment: Path) -> None:
    """Make the tables in a folder of their own. Raises CommandFailed."""
    folder, fresh = template_of(environment), environment / "template.new"
    for each in (folder, fresh):
        shutil.rmtree(each, ignore_errors=True)
    fresh.mkdir()
    # `version` migrates and ends. `--version` would start a server on every address.
    run([str(environment / "bin" / "label-studio"), "version"], state_variables(fresh))
    fresh.rename(folder)
