"""The chunks of one run: whose turn it is, which attempts have begun, what is published, and how they end.

Inference drives it: lines out, commits in. It knows no engine and no task; everything that blocks is called on a
thread by inference.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from vllm_batch_dagster.core.errors import EngineFailure, StorageFailure
from vllm_batch_dagster.core.models import Batch, Chunk, ChunkSummary, StopReason, stop_reason
from vllm_batch_dagster.core.pauses import PAUSED
from vllm_batch_dagster.core.ports import BatchStore, Clock, EngineManager, FileStore, Workspace
from vllm_batch_dagster.core.retry import RetryPolicy
from vllm_batch_dagster.stages.attempts import ChunkAttempt, give_up_chunk
from vllm_batch_dagster.stages.origins import OriginNotes
from vllm_batch_dagster.stages.pausing import PauseBoard, PausePolicy


@dataclass(frozen=True, slots=True)
class InferencePolicy:
    """`chunk_attempts` bounds attempts that end in an engine failure; the commit limits are the journal's.

    Every `poll_seconds` a run looks whether its batch goes on; it gives up after `lost_polls` looks in a row that
    the store did not answer.
    """

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    chunk_attempts: int = 3
    commit_seconds: float = 0.2
    commit_records: int = 256
    poll_seconds: float = 1.0
    lost_polls: int = 60
    pauses: PausePolicy = field(default_factory=PausePolicy)


@dataclass(frozen=True, slots=True)
class InferencePorts:
    """What inference needs from the outside world. `origins` takes note of the engine for the manifest."""

    store: BatchStore
    files: FileStore
    workspace: Workspace
    engines: EngineManager
    clock: Clock
    pauses: PauseBoard | None = None
    origins: OriginNotes | None = None

    @property
    def pause_board(self) -> PauseBoard:
        """The board that was given, else one of the store alone."""
        return self.pauses or PauseBoard(self.store.pauses, self.clock)


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """A published chunk, ready to be shown. `epoch` is the attempt that the result belongs to."""

    index: int
    epoch: int
    summary: ChunkSummary


class RangeWork:
    """The state of a run over `chunks` of `batch`. `fresh` holds the indexes of chunks whose earlier answers are not
    wanted; `on_done` is called for each published chunk."""

    def __init__(
        self,
        ports: InferencePorts,
        batch: Batch,
        chunks: Sequence[Chunk],
        *,
        fresh: frozenset[int],
        run_id: str,
        on_done: Callable[[ChunkDone], None],
    ) -> None:
        self._ports, self._batch, self._chunks = ports, batch, chunks
        self._fresh, self._run_id, self._on_done = fresh, run_id, on_done
        self._waiting = iter(chunks)
        self._begun: dict[int, ChunkAttempt] = {}
        self._published: set[int] = set()

    @property
    def is_published(self) -> bool:
        """True when every chunk has its result."""
        return len(self._published) == len(self._chunks)

    def next_chunk(self) -> Chunk | None:
        """Return the next chunk whose attempt is to begin, None when all have begun."""
        return next(self._waiting, None)

    def begin(self, chunk: Chunk) -> ChunkAttempt:
        """Begin an attempt. Blocks: it reads journals and writes the store."""
        ports = self._ports
        attempt = ChunkAttempt.begin(
            ports.store,
            ports.files,
            ports.workspace,
            self._batch,
            chunk,
            fresh=chunk.index in self._fresh,
            run_id=self._run_id,
            clock=ports.clock,
        )
        self._begun[chunk.index] = attempt
        self._note_origin(attempt)
        return attempt

    def _note_origin(self, attempt: ChunkAttempt) -> None:
        if self._ports.origins is not None:
            self._ports.origins.note(self._batch.id, attempt.index, attempt.epoch)

    def attempts_at_work(self) -> Iterator[ChunkAttempt]:
        """Yield the attempts that have begun and are not published, of those that there are now."""
        for attempt in list(self._begun.values()):
            if attempt.index not in self._published:
                yield attempt

    def mark_done(self, attempt: ChunkAttempt, summary: ChunkSummary) -> None:
        """Note that the attempt's result is published, and show it."""
        self._published.add(attempt.index)
        self._note_origin(attempt)
        self._on_done(ChunkDone(attempt.index, attempt.epoch, summary))

    def settle_engine_failure(self, error: EngineFailure, most_failures: int) -> None:
        """Count the failure against the chunks that were at work, or against all when the engine never came; publish
        those whose attempts are used up as they are. Raises `error` when some are left."""
        unpublished = [chunk for chunk in self._chunks if chunk.index not in self._published]
        at_work = [chunk for chunk in unpublished if chunk.index in self._begun] or unpublished
        left = len(unpublished) - len(at_work)
        for chunk in at_work:
            attempt = self._begun.get(chunk.index) or self.begin(chunk)
            attempt.close()
            summary = give_up_chunk(attempt, most_failures)
            left += summary is None
            if summary is not None:
                self.mark_done(attempt, summary)
        if left:
            raise error

    def settle_stop(self) -> StopReason | None:
        """Keep what is journalled; the merge seals the chunks of a stopping batch."""
        self.close()
        for attempt in self.attempts_at_work():
            attempt.give_back("stopped")
        return stop_reason(self._ports.store.batches.get(self._batch.id), self._ports.clock())

    def settle_pause(self) -> None:
        """Keep what is journalled and give the attempts back; none of it counts as a failure."""
        # The disk or the store may be the very reason: what they do not take is missing, and sent again.
        with suppress(StorageFailure):
            self.close()
        for attempt in self.attempts_at_work():
            with suppress(StorageFailure):
                attempt.give_back(PAUSED)

    def close(self) -> None:
        """Close all journals, also when the disk refuses the last answers of one; then raise that."""
        with ExitStack() as stack:
            for attempt in self._begun.values():
                stack.callback(attempt.close)
