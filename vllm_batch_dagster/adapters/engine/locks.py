"""File locks of the engine folder. The kernel drops a lock when its holder dies, so none is ever stale.

Every hold has an open file of its own, because flock belongs to the open file: two holds in one process exclude each
other like those of two processes. Python opens files close-on-exec, so the engine inherits none of them.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = (0.02, 0.5)


class Hold:
    """A lock that is held until `release`."""

    def __init__(self, file: int) -> None:
        self._file: int | None = file

    def share(self) -> bool:
        """Turn an exclusive hold into a shared one; False when somebody slipped in between, and nothing is held."""
        if self._file is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Let go. Harmless when done twice."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def try_hold(path: Path, *, exclusive: bool) -> Hold | None:
    """Return a hold on `path`, or None when another one excludes it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except BaseException:
        os.close(file)
        raise
    return Hold(file)


async def hold(path: Path, *, on_wait: Callable[[float], None]) -> Hold:
    """Wait for an exclusive hold on `path`; `on_wait` gets the seconds waited so far, at every look.

    It polls, because a thread that blocks in flock cannot be cancelled and would take the lock later for nobody.
    """
    began = time.monotonic()
    pause, longest = _POLL_SECONDS
    while (held := try_hold(path, exclusive=True)) is None:
        on_wait(time.monotonic() - began)
        await asyncio.sleep(pause)
        pause = min(longest, pause * 2)
    return held


@contextmanager
def hold_within(path: Path, seconds: float) -> Iterator[bool]:
    """Try for `seconds` to hold `path` exclusively; yields whether it is held. Blocks the thread."""
    end = time.monotonic() + seconds
    while (held := try_hold(path, exclusive=True)) is None and time.monotonic() < end:
        time.sleep(0.05)
    try:
        yield held is not None
    finally:
        if held is not None:
            held.release()
