"""What the stages need from the outside world. Each Protocol is implemented by one adapter and by one in-memory twin.

The contract tests (tests/contract) run the same behaviour on every implementation.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from vllm_batch_dagster.core.claims import Claim, ClaimKey
from vllm_batch_dagster.core.delivery_ports import DeliveryRecords
from vllm_batch_dagster.core.keys import Key
from vllm_batch_dagster.core.models import (
    Attempt,
    Batch,
    Chunk,
    ChunkRange,
    ChunkSummary,
    File,
    Model,
    Page,
    Usage,
)
from vllm_batch_dagster.core.pause_ports import PauseRecords
from vllm_batch_dagster.core.retention_ports import RetentionRecords
from vllm_batch_dagster.core.states import BatchEvent
from vllm_batch_dagster.core.upload_ports import PartStore, UploadRecords
from vllm_batch_dagster.core.webhook_ports import WebhookRecords


class FileRecords(Protocol):
    """The file table of the batch store."""

    def add(self, file: File, *, claim: Claim | None = None) -> str:
        """Store the record durably before returning, with its `claim` in one transaction. Returns its id, or the id
        of the file that the same claim made before: then nothing is stored. Raises ClaimConflict."""

    def get(self, file_id: str, *, project_id: str | None = None) -> File:
        """Raises NotFound("file", id), also for a deleted file, and for one of another project than `project_id`
        (None: all projects)."""

    def list(
        self,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: str = "desc",
        project_id: str | None = None,
    ) -> Page[File]:
        """Ordered by (created_at, insertion), `order` asc or desc. `after` is exclusive. Unknown `after`: NotFound.
        With `project_id`, what other projects have is unknown, `after` included."""

    def delete(self, file_id: str) -> None:
        """Also gives its claim free. Raises NotFound."""

    def stored_bytes(self, project_id: str, now: float) -> int:
        """Sum over the project's files that have not expired at `now`."""


class BatchRecords(Protocol):
    """The batch table: every status change is a compare-and-set with its outbox event in one transaction."""

    def add(self, batch: Batch, *, claim: Claim | None = None) -> str:
        """Store a new batch durably, with its `claim` in one transaction. Returns its id, or the id of the batch
        that the same claim made before: then nothing is stored. Raises ClaimConflict."""

    def get(self, batch_id: str, *, project_id: str | None = None) -> Batch:
        """Raises NotFound, also for a batch of another project than `project_id` (None: all projects). `counts`
        (but for the total) and `usage` of an open batch that has chunks are the sums of what its chunks mirror."""

    def list(self, *, after: str | None = None, limit: int = 20, project_id: str | None = None) -> Page[Batch]:
        """Newest first. `after` is exclusive. Unknown `after`: NotFound. With `project_id`, what other projects have
        is unknown, `after` included."""

    def open(self) -> Sequence[Batch]:
        """Batches that need attention: not terminal, or with results newer than their merge. Oldest first."""

    def advance(
        self, batch_id: str, event: BatchEvent, now: int, *, files: Sequence[File] = (), **changes: object
    ) -> Batch:
        """Apply `event` and the field `changes` if the state machine allows it, add the records of `files`, and
        write an outbox event when the new status is terminal: all in one transaction. The timestamp field of the
        new status becomes max(now, every earlier timestamp). Raises StateConflict, NotFound."""

    def amend(self, batch_id: str, *, files: Sequence[File] = (), **changes: object) -> Batch:
        """Change fields and add the records of `files` without changing the status (a merge after a rerun). A new
        `merged_version` becomes the `version` of the outbox event, in the same transaction.
        Raises NotFound."""


class ChunkRecords(Protocol):
    """Chunks and their attempts."""

    def plan(self, batch_id: str, ranges: Sequence[ChunkRange]) -> None:
        """Insert the chunks of a batch. Doing it again with the same ranges changes nothing."""

    def list(self, batch_id: str) -> Sequence[Chunk]:
        """In index order; empty when not planned."""

    def get(self, batch_id: str, index: int) -> Chunk:
        """Raises NotFound."""

    def finished(self, model: str, limit: int) -> Sequence[Chunk]:
        """The published chunks of the newest batches of `model`, at most `limit`: what an estimate learns from."""

    def begin(self, batch_id: str, index: int, *, fresh: bool, run_id: str, now: int) -> Attempt:
        """Take the next epoch. `fresh` forgets earlier journals (base_epoch = epoch, engine_failures = 0)."""

    def report(self, attempt: Attempt, completed: int, failed: int, usage: Usage) -> None:
        """Mirror the progress of an attempt. Raises StaleAttempt when a newer epoch exists."""

    def publish(self, attempt: Attempt, summary: ChunkSummary, now: int) -> None:
        """Make the attempt's result the chunk's, and raise the batch's result_version, in one transaction.
        Raises StaleAttempt when a newer epoch exists. Publishing the same attempt twice changes nothing."""

    def give_back(self, attempt: Attempt, outcome: str, now: int) -> None:
        """Record how an attempt ended without publishing: engine_failure, stopped, error. engine_failure raises
        `engine_failures` by one. A stale attempt is only recorded."""


class KeyRecords(Protocol):
    """The bearer keys."""

    def add(self, key: Key) -> None: ...

    def list(self) -> Sequence[Key]:
        """All, revoked ones too, oldest first."""

    def revoke(self, key_id: str, now: int) -> Key:
        """One that is revoked already stays as it is. Raises NotFound("key", id)."""

    def touch(self, key_id: str, now: int) -> None:
        """Note that the key was used. Harmless for an unknown id."""


class IdempotencyRecords(Protocol):
    """Claims of the last 24 hours. FileRecords.add and BatchRecords.add write them."""

    def find(self, claim: Claim, now: float) -> str | None:
        """Return the id of the object that the claim made, None when it is free. Raises ClaimConflict."""

    def is_known(self, key: ClaimKey, now: float) -> bool:
        """True when a claim with this key has made an object, whatever its body was."""


@dataclass(frozen=True, slots=True)
class OutboxEvent:
    """One record per terminal status, for webhooks and other deliveries. `version` is the batch's merged_version:
    a merge after a rerun raises it. `planned_version` is the one whose deliveries were planned, None: none yet."""

    id: str
    batch_id: str
    type: str
    created_at: int
    version: int = 0
    planned_version: int | None = None

    @property
    def is_planned(self) -> bool:
        return self.planned_version == self.version


class BatchStore(Protocol):
    """The meeting point of the shim and Dagster."""

    @property
    def files(self) -> FileRecords: ...
    @property
    def batches(self) -> BatchRecords: ...
    @property
    def chunks(self) -> ChunkRecords: ...
    @property
    def uploads(self) -> UploadRecords: ...
    @property
    def keys(self) -> KeyRecords: ...
    @property
    def idempotency(self) -> IdempotencyRecords: ...
    @property
    def deliveries(self) -> DeliveryRecords: ...
    @property
    def retention(self) -> RetentionRecords: ...
    @property
    def pauses(self) -> PauseRecords: ...
    @property
    def webhooks(self) -> WebhookRecords: ...

    def events(self, batch_id: str) -> Sequence[OutboxEvent]:
        """Outbox events of a batch, oldest first."""


class StoredFile(Protocol):
    """A file being written. Nothing is visible under its id until `commit`."""

    def write(self, data: bytes | bytearray) -> None: ...

    def commit(self) -> tuple[int, str]:
        """fsync, rename into place, fsync the folder. Returns (bytes, sha256 hex)."""

    def discard(self) -> None:
        """Remove the partial file. Harmless after commit."""


class FileStore(Protocol):
    """Contents of files by id, on local disk (S3 later)."""

    @property
    def parts(self) -> PartStore:
        """Where the parts of uploads are until they make a file."""

    def create(self, file_id: str) -> StoredFile: ...

    def open(self, file_id: str) -> BinaryIO:
        """A seekable reader. Raises NotFound."""

    def delete(self, file_id: str) -> None:
        """Harmless when absent."""


class Workspace(Protocol):
    """The folder of one batch: byte index, journals, chunk results. Local paths, because they are appended to."""

    def index_path(self, batch_id: str) -> Path: ...
    def journal_path(self, batch_id: str, chunk: int, epoch: int) -> Path: ...
    def result_path(self, batch_id: str, chunk: int, epoch: int) -> Path: ...
    def suspects_path(self, batch_id: str) -> Path: ...
    def dataset_path(self, name: str, batch_id: str) -> Path: ...


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One line for the engine. `body` is the user's bytes, untouched. Lower `priority` is served earlier."""

    endpoint: str
    body: bytes
    request_id: str
    priority: int = 0


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """What the engine said. `body` is its bytes, untouched; `seconds` the time from dispatch to the last byte."""

    status: int
    body: bytes
    request_id: str
    seconds: float


class EngineLease(Protocol):
    """A shared hold on a running engine for one model. While it is held, nobody swaps or stops the engine."""

    @property
    def window(self) -> int:
        """How many requests to keep in flight: 2 x max_num_seqs (vllm-engine report D10)."""

    async def send(self, request: EngineRequest) -> EngineAnswer:
        """Any HTTP status is an answer. Raises EngineUnavailable when none will come (also when the engine dies
        or is found dead while the request hangs)."""

    async def context_length(self) -> int | None:
        """Tokens that the model's context holds, prompt and answer together; None when the engine does not say."""

    async def recover(self, limit: int | None = None) -> str:
        """Return when the engine serves again, restarting it if we own it: with what was seen of its death, for a
        person. Many callers at once cause one restart. Raises EngineFailure when it cannot be brought back, or was
        `limit` times (None: as the settings say) without one answer between."""


Report = Callable[[str], None]


class EngineManager(Protocol):
    """Starts, adopts, swaps and stops engines; or connects to those of somebody else."""

    def lease(self, model: Model, report: Report) -> AbstractAsyncContextManager[EngineLease]:
        """Make sure that `model` is served and hold it. `report` gets progress sentences while it starts.
        Raises EngineFailure."""

    def warm(self, model: Model, report: Report) -> None:
        """Begin to start an engine for `model` if none runs, without waiting for it and without a hold on it: the
        chunks of a batch that has just passed validation come in a few seconds. Raises nothing that a lease would."""

    def stop_idle(self, idle_seconds: float) -> str | None:
        """Stop our engine if nobody has held it for `idle_seconds`. Returns the stopped model's name."""


class Clock(Protocol):
    """Wall clock in unix seconds."""

    def __call__(self) -> float: ...


class ModelCatalog(Protocol):
    """Models that requests may name."""

    def find(self, name: str) -> Model | None: ...
    def all(self) -> Sequence[Model]: ...
