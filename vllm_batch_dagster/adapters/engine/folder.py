"""What the disk says about our engine: its record, its locks, its log, and when it was last used.

engine.json   the process that was started last, and for which launch
queue.lock    newcomers wait here in line for the engine (held while they wait for one of another model to be free)
start.lock    held by who starts, stops or replaces the process
engine.lock   shared: somebody uses the engine; exclusive: nobody does, and it may be swapped or stopped
engine.log    output of the engine, appended
rungs.json    the rung of the memory ladder that worked, per model and device
last_used     its modification time is when the engine was last used
sockets       what the engine's processes talk through; a killed one leaves them behind
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vllm_batch_dagster.adapters.engine.processes import (
    Member,
    boot_id,
    marked_groups,
    members_of,
    start_of,
    stop_group,
)
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.ladder import Rung

_LOG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """A process that was started as the engine. `serial` differs for every start; `pid` 0: about to be started.

    `log_offset` and `served_from` say where its log begins, and where it stood when it was ready; `rung_words` what of
    its memory settings differs from the configured ones.
    """

    serial: str
    fingerprint: str
    model: str
    command: tuple[str, ...]
    port: int
    max_num_seqs: int
    boot: str
    started_at: float
    log_offset: int
    pid: int = 0
    process_start: str = ""
    members: tuple[Member, ...] = ()
    is_ready: bool = False
    rung: Rung | None = None
    rung_words: str = ""
    max_model_len: int = 0
    served_from: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_alive(self) -> bool:
        """True while the very process that was started runs, not another one with its number."""
        return self.pid > 0 and self.boot == boot_id() and start_of(self.pid) == self.process_start

    def groups(self) -> set[int]:
        """Return the process groups of this engine that still live: its own, proved by its leader or its members."""
        if self.pid == 0 or self.boot != boot_id():
            return set()
        if self.is_alive or set(self.members).intersection(members_of(self.pid)):
            return {self.pid}
        return set()


class EngineFolder:
    """The folder of one engine."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def queue_lock(self) -> Path:
        return self.root / "queue.lock"

    @property
    def start_lock(self) -> Path:
        return self.root / "start.lock"

    @property
    def use_lock(self) -> Path:
        return self.root / "engine.lock"

    @property
    def log(self) -> Path:
        return self.root / "engine.log"

    @property
    def rungs(self) -> Path:
        return self.root / "rungs.json"

    @property
    def sockets(self) -> Path:
        return self.root / "sockets"

    @property
    def _record(self) -> Path:
        return self.root / "engine.json"

    @property
    def _used(self) -> Path:
        return self.root / "last_used"

    def create(self) -> None:
        """Make the folder if it is missing. Raises StorageFailure."""
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.sockets.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageFailure(f"cannot make the engine's folder {self.root}: {error}") from error

    def read(self) -> EngineRecord | None:
        """Return the record; None when there is none, or one that another version wrote."""
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=EngineRecord)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def write(self, record: EngineRecord) -> None:
        """Replace the record durably. Raises StorageFailure."""
        try:
            self.replace_file(self._record, msgspec.json.encode(record))
        except OSError as error:
            raise StorageFailure(f"cannot write the engine's record into {self.root}: {error}") from error

    def replace_file(self, path: Path, content: bytes) -> None:
        """Replace a JSON file of the folder durably. Raises OSError."""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(msgspec.json.format(content, indent=2))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self._sync()

    def forget(self) -> None:
        """Remove the record."""
        self._record.unlink(missing_ok=True)

    def pids(self) -> set[int]:
        """Return the living processes of the engine that is on record."""
        record = self.read()
        return {pid for pid, _start in members_of(record.pid)} if record is not None and record.groups() else set()

    def living_groups(self) -> set[int]:
        """Return every process group that is an engine of this folder, also one whose record was never written."""
        record = self.read()
        return marked_groups(self.root) | (record.groups() if record else set())

    def end_engine(self, grace: float) -> str | None:
        """Stop every process of the engine, `grace` seconds after asking, and forget it. Blocks.

        Returns the model that was served. The caller holds the start lock.
        """
        record = self.read()
        was_alive = record is not None and record.is_alive
        for group in self.living_groups():
            stop_group(group, grace)
        for socket in self.sockets.glob("*"):
            socket.unlink(missing_ok=True)
        self.forget()
        return record.model if record is not None and was_alive else None

    def touch(self) -> None:
        """Note that the engine is used now."""
        self._used.touch()

    def last_used(self) -> float:
        """Return when the engine was last used, in unix seconds; 0 when never."""
        try:
            return self._used.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def idle_seconds(self) -> float:
        return max(0.0, time.time() - self.last_used())

    def log_size(self) -> int:
        """Return how long the log is, in bytes."""
        try:
            return self.log.stat().st_size
        except FileNotFoundError:
            return 0

    def roll_log(self) -> int:
        """Keep one old log when the log has grown long. Returns the offset at which a new engine will write."""
        size = self.log_size()
        if size < _LOG_BYTES:
            return size
        self.log.replace(self.log.with_suffix(".log.1"))
        return 0

    def _sync(self) -> None:
        folder = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
