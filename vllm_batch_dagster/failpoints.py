"""Places at which a test lets a process die, fail or stand still. Beside the data path: nothing happens in production.

The stages and the graph pass named points. A pass does nothing unless the environment variable FAILPOINTS names
a folder; then the file `<point>` or `<point>.<key>` in it, where the key is a batch or an upload, says what happens:

    kill [n]          the n-th pass ends this process as SIGKILL does
    raise [n]         the n-th pass raises InjectedFault, an error that no rule of ours expects
    full [n]          the n-th pass raises OSError(ENOSPC), as a full disk does
    hold [n] [s]      the n-th pass waits until the file `<name>.hit` is gone, at most s seconds (60)

Each file acts once. When it does, it becomes `<name>.hit` with the pid of the process, for the test to see. The folder
is read at every pass, so a test can arm points of a stack that runs. It is no setting: users have no use for it.
"""

import errno
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "FAILPOINTS"
POINTS = (
    "validating",  # nothing is read yet
    "index",  # the byte index is on disk, the chunks are not planned
    "planning",  # the chunks are planned, the batch still says `validating`
    "planned",  # the batch is `in_progress`, Dagster has not heard of it
    "chunk_start",  # an epoch is taken, the journal does not exist
    "mid_chunk",  # a group commit is on the disk
    "last_line",  # every answer is durable, nothing is sealed
    "sealed",  # the result index is on disk, the store does not know it
    "published",  # the store has the result, Dagster has not heard of it
    "finalizing",  # the batch is `finalizing`, nothing is written
    "merging",  # a line of the merged files was written
    "merged",  # both files are in place, the store does not know them
    "ended",  # the batch has its last status, Dagster has not heard of it
    "handlers",  # a handler is about to run
    "joining",  # a block of an upload's parts was copied
    "joined",  # the contents of a completed upload are in place, the store does not know them
)
_POLL_SECONDS = 0.02
_HOLD_SECONDS = 60.0


class InjectedFault(Exception):
    """Raised at a point on a test's order. Outside the tree of core/errors.py on purpose: nobody may expect it."""


def failpoint(point: str, key: str) -> None:
    """Pass a point. Does nothing unless FAILPOINTS is set. Blocks, raises or ends the process on a test's order."""
    folder = os.environ.get(VARIABLE)
    if folder:
        for name in (f"{point}.{key}", point):
            _pass(Path(folder) / name)


def _pass(order: Path) -> None:
    try:
        words = order.read_text().split()
    except OSError:
        return
    action, *numbers = words
    left = int(numbers[0]) if numbers else 1
    if left > 1:
        _replace(order, " ".join((action, str(left - 1), *numbers[1:])))
        return
    hit = order.with_name(order.name + ".hit")
    _replace(order, str(os.getpid()))
    with suppress(OSError):
        order.replace(hit)
    _act(action, hit, float(numbers[1]) if len(numbers) > 1 else _HOLD_SECONDS)


def _act(action: str, hit: Path, seconds: float) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise InjectedFault(hit.stem)
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "hold":
        end = time.monotonic() + seconds
        while hit.exists() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
