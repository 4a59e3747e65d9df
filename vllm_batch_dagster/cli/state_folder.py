"""Who runs on a state folder: the lock that one `up` holds, and its record for `status` and `down`.

`up.lock` is flocked by the running `up` and holds its pid; the kernel drops the lock when `up` dies. `up.json` lists
the processes that `up` started. Both are removed when it stops, and are stale when it was killed.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from vllm_batch_dagster.core.errors import ConfigurationError, StateConflict
from vllm_batch_dagster.settings import Settings

LOCK_TRIES = 5
LOCK_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """One started service. `started_at` in unix seconds."""

    name: str
    pid: int
    started_at: float


@dataclass(frozen=True, slots=True)
class StackRecord:
    """What runs, as `up` last wrote it."""

    pid: int
    started_at: float
    is_ready: bool = False
    services: list[ServiceRecord] = field(default_factory=list)


def make_state_folder(home: Path) -> None:
    """Create `home`, readable by its owner only. Raises ConfigurationError when it cannot be written to."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = home / ".writable"
        with probe.open("wb") as file:
            file.write(b"1")
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"the state folder {home} cannot be written to ({error.strerror}): "
            "make it writable or set VLLM_BATCH_HOME to another folder"
        ) from error


@contextmanager
def hold_stack(home: Path) -> Iterator[None]:
    """Hold the state folder as its only `up`; the lock file and the record are removed at the end.

    Raises StateConflict when another `up` holds it.
    """
    file = _lock(home)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        yield
    finally:
        _record_path(home).unlink(missing_ok=True)
        _lock_path(home).unlink(missing_ok=True)
        os.close(file)


def _lock(home: Path) -> int:
    # Several tries: `status` holds the lock for a moment when it asks who has it, and a stopping `up` removes the
    # file between our open and our lock.
    for _ in range(LOCK_TRIES):
        file = os.open(_lock_path(home), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _try_exclusive(file) and _is_current(file, _lock_path(home)):
            return file
        os.close(file)
        time.sleep(LOCK_PAUSE_SECONDS)
    raise StateConflict(
        f"another `vllm-batch up` (pid {holder_pid(home)}) runs on the state folder {home}: "
        "stop it with `vllm-batch down` or set VLLM_BATCH_HOME to another folder"
    )


def _try_exclusive(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def holder_pid(home: Path) -> int | None:
    """Return the pid of the `up` that holds `home`, None when nobody does."""
    try:
        file = os.open(_lock_path(home), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        text = os.pread(file, 32, 0).strip()
        return int(text) if text.isdigit() else None
    finally:
        os.close(file)


def write_record(home: Path, record: StackRecord) -> None:
    """Replace the record, so that a reader never sees half of one."""
    partial = _record_path(home).with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(record))
    partial.replace(_record_path(home))


def read_record(home: Path) -> StackRecord | None:
    """Return the record of the `up` that holds `home`; None when none does or it has not written one yet."""
    try:
        record = msgspec.json.decode(_record_path(home).read_bytes(), type=StackRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return record if record.pid == holder_pid(home) else None


def has_store(settings: Settings) -> bool:
    """True when the batch store was made before: opening it would create it otherwise."""
    return bool(settings.postgres_host) or (settings.vllm_batch_home / "batches.db").exists()


def _lock_path(home: Path) -> Path:
    return home / "up.lock"


def _record_path(home: Path) -> Path:
    return home / "up.json"
