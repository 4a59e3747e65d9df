"""The engine's process group: start it, recognise it again, stop it, whoever started it.

A vLLM server is several processes (API server, EngineCore, workers) in one group, and killing the first leaves the
others (engine report 5.2). So everything here is about the group; exit codes say nothing and are not read.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

# Variable in the environment of every process of an engine: the folder of the engine that it belongs to.
FOLDER_VARIABLE = "BATCH_ENGINE_FOLDER"

_OUR_INTERPRETER = ("PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")

# Children of this process that nobody has reaped yet.
_children: set[subprocess.Popen[bytes]] = set()

Member = tuple[int, str]


def boot_id() -> str:
    """Return what tells this boot of the machine from the others: process ids mean nothing across it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()))


def start_of(pid: int) -> str | None:
    """Return when `pid` started, in a form that only that process has; None when it is gone or a zombie."""
    _reap()
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return _portable_start_of(pid) if not Path("/proc/self/stat").exists() else None
    except OSError:
        return None
    # The name in parentheses may hold spaces: count fields after it. Field 3 is the state, 22 the start in ticks.
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _portable_start_of(pid: int) -> str | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.Error:
        return None


def spawn(argv: Sequence[str], folder: Path, env: Mapping[str, str], log: Path) -> int:
    """Start `argv` as the leader of a new session that outlives us; its output is appended to `log`.

    Returns its process id, which is also its group's. Raises OSError when the program cannot be run.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env=_environment(argv[0], folder, env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            close_fds=True,
        )
    _children.add(process)
    return process.pid


def _environment(program: str, folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    # PYTHONPATH of our interpreter would put our libraries before those of the engine's environment.
    dropped = _OUR_INTERPRETER if Path(program) == Path(sys.executable) else (*_OUR_INTERPRETER, "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**inherited, **env, FOLDER_VARIABLE: str(folder)}


def members_of(pgid: int) -> list[Member]:
    """Return the living processes of a group with their start."""
    return [(pid, start) for pid in _group(pgid) if (start := start_of(pid)) is not None]


def _group(pgid: int) -> Iterator[int]:
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == pgid:
                yield pid
        except OSError:
            continue


def marked_groups(folder: Path) -> set[int]:
    """Return the groups of living processes that were started as the engine of `folder`, recorded or not."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(FOLDER_VARIABLE) == str(folder) and start_of(process.pid) is not None:
                found.add(os.getpgid(process.pid))
        except (psutil.Error, OSError):
            continue
    return found


def stop_group(pgid: int, grace: float) -> None:
    """Ask the leader to end, wait `grace` seconds for it, then kill what is left of the group. Blocks."""
    if grace > 0 and _signal(pgid, signal.SIGTERM):
        _wait(lambda: start_of(pgid) is None, grace)
        # Workers follow their API server within seconds when it ends by itself.
        _wait(lambda: not members_of(pgid), 3.0)
    kill_group(pgid)


def kill_group(pgid: int) -> None:
    """Kill every process of the group and wait until they are gone (at most 10 s). Blocks."""
    try:
        os.killpg(pgid, signal.SIGKILL)
    except ProcessLookupError:
        return
    _wait(lambda: not members_of(pgid), 10.0)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _wait(is_done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_done() and time.monotonic() < end:
        time.sleep(0.05)


def _reap() -> None:
    """A child that ended stays a zombie until we ask for it."""
    for child in tuple(_children):
        if child.poll() is not None:
            _children.discard(child)
