"""Environments of the real clients: a folder of its own for each, made once with the product's own set-up tools.

In: requirements/clients/<name>.txt. Out: the Python of an environment that is complete.
"""

import sys
from pathlib import Path

from filelock import FileLock

from scripts.commands import ROOT
from scripts.environments import compute_stamp, has_stamp, make_ready, write_stamp
from scripts.installers import get_installers, use_first_that_works
from scripts.interpreters import Interpreter

FOLDER = ROOT / ".venv-clients"


def python_of(name: str) -> Path:
    """Return the Python of a client's environment, which is made when it is missing or older than its lock.

    Raises CommandFailed, SetupError.
    """
    version = sys.version_info
    label = f"{name}-{version[0]}.{version[1]}"
    environment = FOLDER / label
    python = environment / "bin" / "python"
    lock = ROOT / "requirements" / "clients" / f"{name}.txt"
    stamp = compute_stamp(label, [lock])
    FOLDER.mkdir(exist_ok=True)
    with FileLock(FOLDER / f"{label}.lock"):
        if not has_stamp(environment, stamp):
            make_ready(environment, Interpreter(sys.executable, version[:3]), label, with_pip=False)
            use_first_that_works(
                get_installers(Path(sys.prefix), "auto"),
                lambda installer: installer.install(environment, ["-r", str(lock)]),
            )
            write_stamp(environment, stamp)
    return python
