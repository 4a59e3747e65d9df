"""One attempt at one chunk: which lines are still to be sent, their answers, the journal, the publication.

Made by inference when a chunk's turn comes. An attempt whose epoch is no longer the newest can do nothing any more:
the store refuses it with StaleAttempt (design section 5).
"""

import os
from collections.abc import Generator
from dataclasses import dataclass, field, replace

import msgspec

from vllm_batch_dagster.core.answers import as_json_object
from vllm_batch_dagster.core.byteindex import read_entries
from vllm_batch_dagster.core.journal import UNREPAIRED, JournalRecord, encode_record
from vllm_batch_dagster.core.lines import RequestLine, read_line
from vllm_batch_dagster.core.merging import ENGINE_FAILURE
from vllm_batch_dagster.core.models import Attempt, Batch, Chunk, ChunkSummary, Usage
from vllm_batch_dagster.core.ports import BatchStore, Clock, EngineAnswer, FileStore, Workspace
from vllm_batch_dagster.core.rerank import route_request
from vllm_batch_dagster.core.rounds import RoundTally, Tried, next_tried
from vllm_batch_dagster.failpoints import failpoint
from vllm_batch_dagster.stages.healing import take_epoch
from vllm_batch_dagster.stages.journals import JournalWriter, replay
from vllm_batch_dagster.stages.sealing import seal_chunk


@dataclass(frozen=True, slots=True)
class Progress:
    """Lines of the chunk with a final answer, and the tokens of the successful ones."""

    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)

    @property
    def answered(self) -> int:
        return self.completed + self.failed


@dataclass(frozen=True, slots=True)
class Commit:
    """Encoded answers on their way to the disk, and the progress that holds once they are there."""

    records: tuple[bytes, ...]
    progress: Progress


@dataclass(frozen=True, slots=True)
class PendingLine:
    """A line to be sent. `line` is 0-based in the byte index; `endpoint` is the engine's, `body` the user's bytes."""

    attempt: "ChunkAttempt"
    line: int
    custom_id: str
    endpoint: str
    body: bytes
    request_id: str


class ChunkAttempt:
    """See the module docstring. `progress` are lines with a final answer, `durable` those of them on disk."""

    def __init__(
        self,
        store: BatchStore,
        files: FileStore,
        workspace: Workspace,
        batch: Batch,
        chunk: Chunk,
        attempt: Attempt,
        clock: Clock,
    ) -> None:
        self._store, self._files, self._workspace = store, files, workspace
        self._batch, self._chunk, self._attempt, self._clock = batch, chunk, attempt, clock
        self._done = bytearray(chunk.range.line_count)
        self._tally = RoundTally(chunk.range.line_count)
        self._tried: dict[int, Tried] = {}
        self._replayed = self._replayed_tokens = self._sent = 0
        self._fence: dict[int, int] = {}  # epoch -> end of what was read of its journal: later appends are no answers
        self._buffer: list[bytes] = []
        self._progress = self._durable = self._mirrored = Progress()
        self._first_sent_at = self._last_answer_at = 0.0
        self._writer: JournalWriter | None = None

    @classmethod
    def begin(
        cls,
        store: BatchStore,
        files: FileStore,
        workspace: Workspace,
        batch: Batch,
        chunk: Chunk,
        *,
        fresh: bool,
        run_id: str,
        clock: Clock,
    ) -> "ChunkAttempt":
        """Take the next epoch of `chunk`, read what earlier attempts have answered, and open a journal."""
        attempt = take_epoch(store, workspace, chunk, fresh=fresh, run_id=run_id, now=int(clock()))
        failpoint("chunk_start", batch.id)
        begun = cls(store, files, workspace, batch, chunk, attempt, clock)
        begun._replay()
        path = workspace.journal_path(batch.id, chunk.index, attempt.epoch)
        begun._writer = JournalWriter(path)
        return begun

    @property
    def index(self) -> int:
        return self._chunk.index

    @property
    def epoch(self) -> int:
        return self._attempt.epoch

    @property
    def engine_failures(self) -> int:
        """Earlier attempts that ended because the engine could not answer."""
        return self._attempt.engine_failures

    @property
    def has_result(self) -> bool:
        """True when an earlier attempt was published."""
        return self._chunk.is_published

    @property
    def is_answered(self) -> bool:
        return self._progress.answered == self._chunk.range.line_count

    @property
    def is_durable(self) -> bool:
        """True when every line has an answer on disk."""
        return self._durable.answered == self._chunk.range.line_count

    @property
    def uncommitted(self) -> int:
        """Answers that wait for their fsync."""
        return len(self._buffer)

    def describe(self) -> str:
        """Return one sentence for the log: how much is left to send."""
        total = self._chunk.range.line_count
        return (
            f"chunk {self.index:04d} of {self._batch.id}, attempt {self.epoch}: {self._replayed} of {total} lines "
            f"answered by earlier attempts, sending {total - self._replayed}"
        )

    def _replay(self) -> None:
        """Mark what earlier epochs have answered. The newest epoch has no journal yet."""
        epochs = (self._attempt.base_epoch, self._attempt.epoch - 1)
        for epoch, placed in replay(self._workspace, self._batch.id, self.index, *epochs):
            self._count(placed.record)
            self._fence[epoch] = placed.end
        self._durable = self._progress
        self._replayed = self._durable.answered
        self._replayed_tokens = self._durable.usage.total_tokens

    def _count(self, record: JournalRecord) -> bool:
        """Add an answer to the progress. Returns False when its line already had one: the first accepted one wins."""
        position = record.line - self._chunk.range.first_line
        if self._done[position]:
            return False
        before = self._progress
        usage = self._tally.usage_of(position, record)
        if not record.is_final:
            self._tried[record.line] = next_tried(self._tried.get(record.line), record)
            self._progress = replace(before, usage=before.usage + usage)
            return True
        self._done[position] = 1
        self._tried.pop(record.line, None)
        self._progress = Progress(before.completed + record.ok, before.failed + (not record.ok), before.usage + usage)
        return True

    def pending_lines(self) -> Generator[PendingLine, None, None]:
        """Yield the lines without an answer, reading each from its byte range of the input file."""
        chunk = self._chunk.range
        with (
            self._workspace.index_path(self._batch.id).open("rb") as index,
            self._files.open(self._batch.input_file_id) as source,
        ):
            for position, entry in enumerate(read_entries(index, chunk.first_line, chunk.line_count)):
                if self._done[position]:
                    continue
                source.seek(entry.offset, os.SEEK_SET)
                request = read_line(source.read(entry.length))
                self._first_sent_at = self._first_sent_at or self._clock()
                yield self._pending(chunk.first_line + position, request)

    def _pending(self, line: int, request: RequestLine) -> PendingLine:
        body = bytes(request.body)
        endpoint = route_request(request.url, body)
        return PendingLine(self, line, request.custom_id, endpoint, body, f"{self._batch.id}-{line}")

    def tried(self, line: int) -> Tried | None:
        """Return what an unanswered line has had of repair rounds, in this attempt or an earlier one."""
        return self._tried.get(line)

    def accept_tried(self, line: int) -> None:
        """Accept the last success of a line that was asked again, though it is flawed."""
        self._sent += 1
        record = msgspec.structs.replace(self._tried[line].record, repair=UNREPAIRED)
        if self._count(record):
            self._buffer.append(encode_record(record))

    def accept(
        self, line: PendingLine, answer: EngineAnswer, ok: bool, tries: int, *, round_: int = 0, repair: str = ""
    ) -> None:
        """Take an answer of a line into the journal's buffer; `repair` says whether it is the final one."""
        self._last_answer_at = self._clock()
        record = JournalRecord(
            line=line.line,
            custom_id=line.custom_id,
            ok=ok,
            status=answer.status,
            request_id=answer.request_id or line.request_id,
            seconds=round(answer.seconds, 4),
            tries=tries,
            body=msgspec.Raw(as_json_object(answer.body, answer.status)),
            round=round_,
            repair=repair,
        )
        self._sent += record.is_final
        if self._count(record):
            self._buffer.append(encode_record(record))

    def take_commit(self) -> Commit:
        """Take the buffered answers, to be written by `commit`. Call it where `accept` is called: not thread-safe."""
        records, self._buffer = tuple(self._buffer), []
        return Commit(records, self._progress)

    def commit(self, commit: Commit) -> None:
        """Make the answers of `commit` durable; may run on another thread. Raises StorageFailure."""
        if commit.records and self._writer is not None:
            self._writer.write(commit.records)
            failpoint("mid_chunk", self._batch.id)
            self._durable = commit.progress

    def mirror_progress(self) -> None:
        """Tell the store what is durable. Raises StaleAttempt when a newer attempt has taken over."""
        if self._durable != self._mirrored:
            told = self._durable
            self._store.chunks.report(self._attempt, told.completed, told.failed, told.usage)
            self._mirrored = told

    def publish(self, reason: str = "") -> ChunkSummary:
        """Seal the journals and make the result the chunk's. Lines without an answer get the code `reason`."""
        failpoint("last_line", self._batch.id)
        summary = seal_chunk(
            self._workspace,
            self._chunk,
            self._attempt,
            reason=reason,
            fence=self._fence,
            first_sent_at=self._first_sent_at,
            last_answer_at=self._last_answer_at,
            replayed=self._replayed,
            sent=self._sent,
            sent_tokens=self._progress.usage.total_tokens - self._replayed_tokens,
        )
        failpoint("sealed", self._batch.id)
        self._store.chunks.publish(self._attempt, summary, int(self._clock()))
        failpoint("published", self._batch.id)
        return summary

    def give_back(self, outcome: str) -> None:
        """Record that the attempt ended without a result: `stopped` or `engine_failure`."""
        self._store.chunks.give_back(self._attempt, outcome, int(self._clock()))

    def close(self) -> None:
        """Commit what is buffered and close the journal. Harmless when closed."""
        if self._writer is not None:
            try:
                self.commit(self.take_commit())
            finally:
                self._writer.close()
                self._writer = None


def give_up_chunk(attempt: ChunkAttempt, most_failures: int) -> ChunkSummary | None:
    """Count an engine failure against a chunk. When it is the last one allowed, publish what there is, the rest of
    the lines with the code `engine_failure`; else return None, and a later attempt goes on from the journals.

    A chunk that has a result keeps it until a better one is whole.
    """
    is_last = attempt.engine_failures + 1 >= most_failures and not attempt.has_result
    if attempt.is_durable or is_last:
        return attempt.publish(reason=ENGINE_FAILURE)
    attempt.give_back(ENGINE_FAILURE)
    return None
