"""Turns the journals of an attempt into the chunk's published result: an index of answers and a summary.

Called when a chunk is finished, and by the merge for chunks of a batch that stops early.
"""

import hashlib
from array import array
from collections import Counter

from vllm_batch_dagster.core.answers import read_answer
from vllm_batch_dagster.core.histogram import Histogram
from vllm_batch_dagster.core.journal import PlacedRecord
from vllm_batch_dagster.core.models import Attempt, Chunk, ChunkSummary, RequestCounts, Usage
from vllm_batch_dagster.core.ports import Workspace
from vllm_batch_dagster.core.results import FAILED, SUCCEEDED, ResultEntry, ResultTable
from vllm_batch_dagster.stages.journals import replay
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
        record = placed.record
        self.latencies.append(record.seconds)
        facts = read_answer(bytes(record.body))
        if not record.ok:
            self.failed += 1
            self.error_codes[f"{record.status} {facts.error}".strip()] += 1
            return
        self.completed += 1
        self.usage += facts.usage
        self.finish_reasons.update(facts.finish_reasons)
        self.input_lengths.add(facts.usage.input_tokens)
        self.output_lengths.add(facts.usage.output_tokens)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) if ordered else 0.0


class _SetDigest:
    """A digest of records that does not hang on their order, which in a journal is that of arrival."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, record: bytes) -> None:
        self._sum += int.from_bytes(hashlib.sha256(record).digest())

    def hexdigest(self) -> str:
        return f"{self._sum % (1 << 256):064x}"


def seal_chunk(
    workspace: Workspace,
    chunk: Chunk,
    attempt: Attempt,
    *,
    reason: str,
    first_sent_at: float = 0.0,
    last_answer_at: float = 0.0,
    replayed: int = 0,
    sent: int = 0,
    sent_tokens: int = 0,
) -> ChunkSummary:
    """Write the result index of `attempt` and return its summary. Lines without an answer get the code `reason`.

    Running it again for the same attempt writes the same bytes. The first answer of a line wins.
    """
    table, summing, digest = ResultTable(chunk.range.line_count), _Summing(), _SetDigest()
    for epoch, placed in replay(workspace, chunk.batch_id, chunk.index, attempt.base_epoch, attempt.epoch):
        outcome = SUCCEEDED if placed.record.ok else FAILED
        entry = ResultEntry(epoch, placed.offset, placed.length, outcome)
        if table.put(placed.record.line - chunk.range.first_line, entry):
            summing.add(placed)
            digest.add(b"%d:" % placed.record.line + bytes(placed.record.body))
    with publish(workspace.result_path(chunk.batch_id, chunk.index, attempt.epoch)) as index:
        index.write(table.pack(reason))
    unanswered = chunk.range.line_count - summing.completed - summing.failed
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
    )
