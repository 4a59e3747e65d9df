"""Turns the journals of an attempt into the chunk's published result: an index of answers and a summary.

Called when a chunk is finished, and by the merge for chunks of a batch that stops early.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping

from vllm_batch_dagster.core.answers import describe_error, read_answer
from vllm_batch_dagster.core.errors import CorruptJournal
from vllm_batch_dagster.core.histogram import Histogram
from vllm_batch_dagster.core.journal import JournalRecord, PlacedRecord
from vllm_batch_dagster.core.models import Attempt, Chunk, ChunkSummary, RequestCounts, Usage
from vllm_batch_dagster.core.ports import Workspace
from vllm_batch_dagster.core.results import FAILED, SUCCEEDED, UNANSWERED, ResultEntry, ResultTable
from vllm_batch_dagster.core.rounds import RoundTally
from vllm_batch_dagster.stages.journals import JournalReader, replay
from vllm_batch_dagster.stages.publication import publish


class _Summing:
    """Adds up what a summary says, one answer at a time."""

    def __init__(self) -> None:
        self.usage = Usage()
        self.completed = self.failed = 0
        self.finish_reasons: Counter[str] = Counter()
        self.error_codes: Counter[str] = Counter()
        self.latencies = array("f")
        self.input_lengths, self.output_lengths = Histogram(), Histogram()

    def add(self, placed: PlacedRecord) -> None:
        """Take the accepted answer of a line; its tokens are counted apart, with those of the answers before it."""
        record = placed.record
        self.latencies.append(record.seconds)
        facts = read_answer(bytes(record.body))
        if not record.ok:
            self.failed += 1
            self.error_codes[describe_error(record.status, facts, bytes(record.body))] += 1
            return
        self.completed += 1
        self.finish_reasons.update(facts.finish_reasons)
        self.input_lengths.add(facts.usage.input_tokens)
        self.output_lengths.add(facts.usage.output_tokens)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) if ordered else 0.0


class AnswersDigest:
    """The digest of a chunk's answers and their lines. Their order, in a journal that of arrival, does not matter."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, record: JournalRecord) -> None:
        self._sum += int.from_bytes(hashlib.sha256(b"%d:" % record.line + bytes(record.body)).digest())

    def hexdigest(self) -> str:
        return f"{self._sum % (1 << 256):064x}"


class _Harvest:
    """The accepted answers of a chunk, out of all that its journals hold."""

    def __init__(self, chunk: Chunk, records: Iterable[tuple[int, PlacedRecord]]) -> None:
        self.table, self.summing, self.digest = ResultTable(chunk.range.line_count), _Summing(), AnswersDigest()
        self.tally = RoundTally(chunk.range.line_count)
        self._first_line = chunk.range.first_line
        self._tried: dict[int, ResultEntry] = {}  # where they lie: their bodies may be a chunk's
        for epoch, placed in records:
            self._take(epoch, placed)

    def _take(self, epoch: int, placed: PlacedRecord) -> None:
        position = placed.record.line - self._first_line
        if self.table.outcome(position) != UNANSWERED:
            return
        self.summing.usage += self.tally.add(position, placed.record)
        if placed.record.is_final:
            self._tried.pop(position, None)
            self._accept(position, epoch, placed)
        elif placed.record.ok:
            self._tried[position] = ResultEntry(epoch, placed.offset, placed.length, SUCCEEDED)

    def accept_tried(self, journals: JournalReader) -> None:
        """No more rounds come: a flawed answer is better than none."""
        for position, entry in sorted(self._tried.items()):
            self.tally.add_given_up()
            self._accept(position, entry.epoch, PlacedRecord(entry.offset, entry.length, journals.read(entry)))

    def _accept(self, position: int, epoch: int, placed: PlacedRecord) -> None:
        outcome = SUCCEEDED if placed.record.ok else FAILED
        self.table.put(position, ResultEntry(epoch, placed.offset, placed.length, outcome))
        self.summing.add(placed)
        self.digest.add(placed.record)


def seal_chunk(
    workspace: Workspace,
    chunk: Chunk,
    attempt: Attempt,
    *,
    reason: str,
    fence: Mapping[int, int] | None = None,
    first_sent_at: float = 0.0,
    last_answer_at: float = 0.0,
    replayed: int = 0,
    sent: int = 0,
    sent_tokens: int = 0,
) -> ChunkSummary:
    """Write the result index of `attempt` and return its summary. Lines without an answer get the code `reason`.

    Running it again for the same attempt writes the same bytes. The first accepted answer of a line wins; of a line
    that was given up in the middle of its repair rounds, the last success. `fence` is where the
    journals of earlier attempts ended when this one read them (see `replay`): only that counts. Raises StorageFailure,
    CorruptJournal when a line has no answer and there is no `reason` for that.
    """
    epochs = (attempt.base_epoch, attempt.epoch)
    harvest = _Harvest(chunk, replay(workspace, chunk.batch_id, chunk.index, *epochs, fence=fence))
    if reason:
        with JournalReader(workspace, chunk.batch_id, chunk.index) as journals:
            harvest.accept_tried(journals)
    table, summing, digest = harvest.table, harvest.summing, harvest.digest
    unanswered = chunk.range.line_count - summing.completed - summing.failed
    if unanswered and not reason:
        # Read back intact when the attempt began, or written by it: the disk has lost it since.
        raise CorruptJournal(f"{unanswered} answers of chunk {chunk.index} are damaged on disk; run the chunk again")
    with publish(workspace.result_path(chunk.batch_id, chunk.index, attempt.epoch)) as index:
        index.write(table.pack(reason if unanswered else ""))
    return ChunkSummary(
        counts=RequestCounts(chunk.range.line_count, summing.completed, summing.failed + unanswered),
        usage=summing.usage,
        first_sent_at=first_sent_at,
        last_answer_at=last_answer_at,
        replayed=replayed,
        sent=sent,
        sent_tokens=sent_tokens,
        latency_p50=summing.quantile(0.5),
        latency_p95=summing.quantile(0.95),
        finish_reasons=dict(summing.finish_reasons),
        error_codes=dict(summing.error_codes.most_common(10)) | ({reason: unanswered} if unanswered else {}),
        input_lengths=summing.input_lengths.buckets(),
        output_lengths=summing.output_lengths.buckets(),
        digest=digest.hexdigest(),
        repairs=harvest.tally.counts,
    )
