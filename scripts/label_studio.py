"""A real Label Studio for the length of a `with` block, on a state folder of its own and a free port.

In: `.venv-label-studio` (`make setup-label-studio`). Out: its address and one user with both kinds of keys. Used by the
tests of the curation and by whoever shows it; a deployment uses Label Studio's own container.
"""

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.commands import ROOT
from scripts.environments import compute_stamp, has_stamp, read_interpreter
from scripts.label_studio_environment import ENVIRONMENT, LOCK, RECIPE, state_variables, template_of

EMAIL, PASSWORD = "reviewer@example.test", "a-password-of-the-demo"
START_SECONDS = 300
STOP_SECONDS = 15
# Below those that systems choose themselves, for connections and for whoever asks for any port.
PORTS = range(20_000, 30_000)
_FOREIGN = ("DJANGO_", "POSTGRE_", "LABEL_STUDIO_")
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LabelStudioFailed(Exception):
    """It is not installed, or did not become ready: one sentence, then perhaps the end of its log."""


@dataclass(frozen=True, slots=True)
class LabelStudio:
    """A running server. `token` is a legacy token of the user EMAIL, PASSWORD."""

    url: str
    port: int
    token: str
    folder: Path


def find_program() -> Path:
    """Return the program of the environment. Raises LabelStudioFailed when that is missing or of another lock."""
    environment = ROOT / ENVIRONMENT
    python = read_interpreter(environment)
    label = f"label-studio {RECIPE} {python.label}" if python else ""
    if not has_stamp(environment, compute_stamp(label, [ROOT / LOCK])):
        raise LabelStudioFailed(f"{ENVIRONMENT} is missing or old: run `make setup-label-studio`")
    return environment / "bin" / "label-studio"


@contextmanager
def running_label_studio(folder: Path, token: str | None = None) -> Iterator[LabelStudio]:
    """Run it on the state in `folder`, which is made when it is empty or missing. Raises LabelStudioFailed."""
    program = find_program()
    if not folder.exists() or not any(folder.iterdir()):
        shutil.copytree(template_of(ROOT / ENVIRONMENT), folder, dirs_exist_ok=True)
    port = _choose_port()
    running = LabelStudio(f"http://127.0.0.1:{port}", port, token or _kept_token(folder), folder)
    # `start` takes the next port when this one is taken: see _wait.
    command = [str(program), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=_environment(folder, running.token),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(running, process, log)
        yield running
    finally:
        _stop(process)


def _kept_token(folder: Path) -> str:
    """The token of the user is set when the state is new; a later start on the same folder needs the same one."""
    path = folder / "token"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(20))
    return path.read_text()


def _environment(folder: Path, token: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {
        **inherited,
        **state_variables(folder),
        "LABEL_STUDIO_USERNAME": EMAIL,
        "LABEL_STUDIO_PASSWORD": PASSWORD,
        "LABEL_STUDIO_USER_TOKEN": token,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        # Its webhooks may reach this machine.
        "LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS": "false",
    }


def _choose_port() -> int:
    """Return a free port that the system gives to nobody: the server takes it only half a minute later."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LabelStudioFailed(f"no free port was found from {PORTS.start} to {PORTS.stop - 1}")


def _wait(running: LabelStudio, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not _is_up(running.url):
        if process.poll() is not None or time.monotonic() > end:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise LabelStudioFailed(f"Label Studio did not become ready:\n{tail}")
        time.sleep(0.2)


def _is_up(url: str) -> bool:
    try:
        with _direct.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    # The whole group: its reloader is a process of its own.
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
