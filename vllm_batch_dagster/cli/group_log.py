"""One readable log of several processes: each line with the name of who wrote it, and a rotated file per service.

In: the output pipes of the services, and the engine's log file. Out: the terminal of `vllm-batch up` and
VLLM_BATCH_HOME/logs. Filled by threads of the supervisor, one per source.
"""

import re
import threading
from collections import deque
from collections.abc import Mapping
from logging import makeLogRecord
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, TextIO

import typer

FILE_BYTES = 10 << 20
OLD_FILES = 3
RECENT_LINES = 15
LINE_BYTES = 64 << 10
FOLLOW_SECONDS = 0.5
NAME_WIDTH = 6

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

# What Dagster's daemon says every few seconds although nothing happens, and what a run says about itself. It is
# left out on the terminal and kept in the files.
_CHATTER = re.compile(
    r"Checking for new runs for|Sensor \w+ skipped|Priority sorting and checking|Collected \d+ runs for"
    r"|Checking run [0-9a-f-]{36}|LOCATION_UPDATED|Executing steps in process"
    r"|RESOURCE_INIT_|LOGS_CAPTURED|HANDLED_OUTPUT|LOADED_INPUT|STEP_INPUT|STEP_OUTPUT|_PLANNED - "
)


class GroupLog:
    """Writes lines of several sources to one terminal and to a file for each. Safe to use from many threads."""

    def __init__(self, folder: Path, terminal: TextIO | None, colours: Mapping[str, str]) -> None:
        """`terminal` None: files only. `colours` of the names, used when the terminal shows colours."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._terminal = terminal
        self._is_coloured = terminal is not None and terminal.isatty()
        self._colours = colours
        self._files: dict[str, RotatingFileHandler] = {}
        self._recent: dict[str, deque[str]] = {}
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def recent(self, name: str) -> list[str]:
        """Return the last lines of a source, oldest first."""
        with self._lock:
            return list(self._recent.get(name, ()))

    def add(self, name: str, line: str) -> None:
        """Take a line of a service: to its file and, unless it is chatter, to the terminal."""
        with self._lock:
            plain = _ANSI.sub("", line)
            self._recent.setdefault(name, deque(maxlen=RECENT_LINES)).append(plain)
            self._file(name).emit(makeLogRecord({"msg": plain}))
            self._show(name, line)

    def show(self, name: str, line: str) -> None:
        """Take a line for the terminal only."""
        with self._lock:
            self._show(name, line)

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()

    def _file(self, name: str) -> RotatingFileHandler:
        if name not in self._files:
            self._files[name] = RotatingFileHandler(self.path(name), maxBytes=FILE_BYTES, backupCount=OLD_FILES)
        return self._files[name]

    def _show(self, name: str, line: str) -> None:
        if self._terminal is None or _CHATTER.search(line):
            return
        prefix = f"{name:<{NAME_WIDTH}} | "
        text = line if self._is_coloured else _ANSI.sub("", line)
        shown = typer.style(prefix, fg=self._colours.get(name)) if self._is_coloured else prefix
        try:
            self._terminal.write(f"{shown}{text}\n")
            self._terminal.flush()
        except (OSError, ValueError):
            self._terminal = None  # the terminal was closed; the files go on


def pump(log: GroupLog, name: str, pipe: IO[bytes]) -> threading.Thread:
    """Copy the lines of `pipe` to `log` until its last writer closes it. Returns the started thread."""

    def copy() -> None:
        while raw := pipe.readline(LINE_BYTES):
            log.add(name, raw.decode("utf-8", "replace").rstrip("\r\n"))

    thread = threading.Thread(target=copy, name=f"log-{name}", daemon=True)
    thread.start()
    return thread


class FileFollower:
    """Shows what is appended to a file that another process owns, also after it was replaced or cut."""

    def __init__(self, log: GroupLog, name: str, path: Path) -> None:
        self._log = log
        self._name = name
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"log-{name}", daemon=True)
        self._inode, self._offset = self._identify()
        self._rest = b""

    def start(self) -> None:
        """Begin with what is written from now on."""
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _identify(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError:
            return 0, 0
        return status.st_ino, status.st_size

    def _follow(self) -> None:
        while not self._stop.wait(FOLLOW_SECONDS):
            self.read_new()
        self.read_new()

    def read_new(self) -> None:
        """Show every complete line that was appended since the last call."""
        inode, size = self._identify()
        if inode != self._inode or size < self._offset:
            self._inode, self._offset, self._rest = inode, 0, b""
        if size > self._offset:
            self._show_from_offset()

    def _show_from_offset(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while data := file.read(LINE_BYTES):
                self._offset += len(data)
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    self._log.show(self._name, line.decode("utf-8", "replace").rstrip("\r"))
