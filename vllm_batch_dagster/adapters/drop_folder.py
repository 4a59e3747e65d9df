"""The drop folder on local disk. Called by stages/inbox.py through its ports.

inbox/NAME.jsonl, NAME.yaml           what people drop
inbox/.taken/<drop>/                  a drop that we go on with: the file, its order, and `.drop.json`, written first
inbox/done/<drop>/, rejected/<drop>/  the same folder, moved there in one rename, with `report.md`

A file is taken by a rename, so it is taken once, and it never lies in two places.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import yaml
from filelock import FileLock, Timeout

from vllm_batch_dagster.core.errors import InvalidInput, StorageFailure
from vllm_batch_dagster.core.inbox import Look, Verdict, is_dropped_file, is_whole, order_names
from vllm_batch_dagster.stages.publication import make_folder, publish, sync_folder, unwritable

REPORT = "report.md"
_TAKEN, _NOTE, _LOCK = ".taken", ".drop.json", ".lock"
_MOST_ORDER_BYTES = 64 << 10


class LocalDrop:
    """See Drop. `folder` holds everything of it."""

    def __init__(self, folder: Path, filename: str, order: str | None) -> None:
        self._folder, self._filename, self._order = folder, filename, order

    @property
    def id(self) -> str:
        return self._folder.name

    @property
    def filename(self) -> str:
        return self._filename

    def open(self) -> BinaryIO:
        path = self._folder / self._filename
        try:
            return path.open("rb")
        except OSError as error:
            raise StorageFailure(f"{path} cannot be read: {error.strerror}") from error

    def read_order(self) -> object:
        if self._order is None:
            return None
        try:
            with (self._folder / self._order).open("rb") as order:
                text = order.read(_MOST_ORDER_BYTES + 1)
            if len(text) > _MOST_ORDER_BYTES:
                raise InvalidInput(f"{self._order} is larger than {_MOST_ORDER_BYTES} bytes")
            return yaml.safe_load(text)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageFailure(f"{self._order} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{self._order} is no YAML: {error}") from error

    def finish(self, verdict: Verdict, report: str) -> None:
        target = self._folder.parent.parent / verdict.value / self.id
        with publish(self._folder / REPORT) as file:
            file.write(report.encode())
        try:
            self._folder.replace(target)
        except OSError as error:
            raise unwritable(target, error) from error
        sync_folder(target.parent)
        sync_folder(self._folder.parent)


class LocalDropFolder:
    """See DropFolder. A file is left alone for `settle_seconds` after its last change. `clock` in unix seconds."""

    def __init__(self, root: Path, settle_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._root, self._settle_seconds, self._clock = root, settle_seconds, clock

    def create(self) -> None:
        """Make the folders, so that people see where to drop. Raises StorageFailure."""
        for folder in (self._root, self._root / _TAKEN, *(self._root / verdict.value for verdict in Verdict)):
            make_folder(folder)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        self.create()
        lock = FileLock(self._root / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def waiting(self) -> Iterator[str]:
        with suppress(FileNotFoundError), os.scandir(self._root) as entries:
            names = [(entry.stat().st_mtime, entry.name) for entry in entries if _is_drop(entry)]
            for _changed, name in sorted(names):
                if self._is_whole(name) and all(self._is_order_whole(order) for order in order_names(name)):
                    yield name

    def _is_whole(self, name: str) -> bool:
        try:
            return is_whole(look_at(self._root / name, self._clock()), self._settle_seconds)
        except OSError:
            return False  # it is gone, or not ours to read; the next look tells

    def _is_order_whole(self, name: str) -> bool:
        """True for one that is not there, too: it is dropped before its file, or not at all."""
        try:
            return abs(self._clock() - (self._root / name).stat().st_mtime) >= self._settle_seconds
        except OSError:
            return True

    def take(self, name: str, drop_id: str) -> LocalDrop | None:
        folder = self._root / _TAKEN / drop_id
        order = next((each for each in order_names(name) if (self._root / each).is_file()), None)
        make_folder(folder)
        # What is going to be moved is written down first: whoever goes on after a death knows what belongs together.
        with publish(folder / _NOTE) as note:
            note.write(json.dumps({"filename": name, "order": order}).encode())
        if not self._move(name, folder):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return self._complete(folder, name, order)

    def taken(self) -> Iterator[LocalDrop]:
        with suppress(FileNotFoundError):
            for folder in sorted((self._root / _TAKEN).iterdir()):
                drop = self._resume(folder)
                if drop is not None:
                    yield drop

    def _resume(self, folder: Path) -> LocalDrop | None:
        try:
            note = json.loads((folder / _NOTE).read_bytes())
        except FileNotFoundError:
            note = {"filename": ""}
        name = note["filename"]
        if not name or not (folder / name).exists():
            shutil.rmtree(folder, ignore_errors=True)  # its taker died before the rename: the file is still outside
            return None
        return self._complete(folder, name, note["order"])

    def _complete(self, folder: Path, name: str, order: str | None) -> LocalDrop:
        if order is not None and not (folder / order).exists():
            self._move(order, folder)
        return LocalDrop(folder, name, order)

    def _move(self, name: str, folder: Path) -> bool:
        try:
            (self._root / name).replace(folder / name)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unwritable(folder / name, error) from error
        sync_folder(folder)
        sync_folder(self._root)
        return True


def look_at(path: Path, now: float) -> Look:
    """Raises OSError."""
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        ends_a_line = False
        if facts.st_size:
            file.seek(-1, os.SEEK_END)
            ends_a_line = file.read(1) == b"\n"
        return Look(now - facts.st_mtime, ends_a_line, _is_open_for_writing(file.fileno()))


def _is_open_for_writing(descriptor: int) -> bool | None:
    """Ask Linux for a read lease, which it grants only on a file that nobody has open for writing (fcntl(2))."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return None
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None  # not our file, or a file system without leases
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _is_drop(entry: "os.DirEntry[str]") -> bool:
    """A link is no drop: it could show any file of this machine to whoever may drop."""
    return is_dropped_file(entry.name) and entry.is_file(follow_symlinks=False)
