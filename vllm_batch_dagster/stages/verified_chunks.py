"""Checks the published chunks of a batch: result indexes, journals, and each answer on its way to the merged files.

Part of stages/verification.py. One line is in memory at a time; damage to one is reported and the next goes on.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, NamedTuple

from vllm_batch_dagster.core.byteindex import IndexEntry, read_entries
from vllm_batch_dagster.core.errors import CorruptJournal, NotFound, StorageFailure
from vllm_batch_dagster.core.journal import HEAD_BYTES, JournalRecord
from vllm_batch_dagster.core.lines import hash_custom_id
from vllm_batch_dagster.core.manifest import ChunkEntry
from vllm_batch_dagster.core.merging import render_answer, render_unanswered
from vllm_batch_dagster.core.models import Batch, Chunk
from vllm_batch_dagster.core.ports import FileStore, Workspace
from vllm_batch_dagster.core.results import FAILED, NO_ANSWER, SUCCEEDED, ResultEntry, ResultIndex, read_results
from vllm_batch_dagster.core.verification import Kind, Problem, VerifyReport, rerun_chunk
from vllm_batch_dagster.stages.digests import digest_file
from vllm_batch_dagster.stages.input_order import custom_id_at
from vllm_batch_dagster.stages.journals import JournalReader
from vllm_batch_dagster.stages.sealing import AnswersDigest

_COUNT_AT, _RESULT_HEADER_BYTES, _RESULT_ENTRY_BYTES = 8, 44, 17  # as core/results.py lays them out


class ExpectedLine(NamedTuple):
    """What must stand in a merged file. `offset` orders lines as in the input file; `line` is what was rendered, None
    when the answer is damaged, and then `ok` (output or error file) is None too. `is_answer`: bytes of an engine."""

    offset: int
    id_hash: int
    ok: bool | None
    line: bytes | None
    is_answer: bool


@dataclass(frozen=True, slots=True)
class PublishedChunk:
    """A chunk as it was merged, or as it is published when there is no manifest. `answers` is the digest of them."""

    chunk: Chunk
    epoch: int
    answers: str
    completed: int
    told: ChunkEntry | None


def published_chunks(
    chunks: Sequence[Chunk], told: Sequence[ChunkEntry], report: VerifyReport
) -> Iterator[PublishedChunk]:
    """Yield the chunks that can be checked: as the manifest tells them, else as the store does."""
    by_index = {entry.index: entry for entry in told}
    for chunk in chunks:
        entry, summary = by_index.get(chunk.index), chunk.summary
        if entry is not None:
            if (summary is None or entry.answers != summary.digest) and entry.epoch == chunk.published_epoch:
                message = f"the manifest has another digest of chunk {chunk.index:04d} than the store"
                report.add(Problem(Kind.RECORD, entry.result.name, message, rerun_chunk(chunk.batch_id, chunk.index)))
            if entry.epoch != chunk.published_epoch:
                report.notes.append(f"chunk {chunk.index:04d} was run again; its new answers are not merged yet")
            yield PublishedChunk(chunk, entry.epoch, entry.answers, entry.completed, entry)
        elif summary is not None:
            yield PublishedChunk(chunk, chunk.published_epoch, summary.digest, summary.counts.completed, None)


class ChunkCheck:
    """Checks one published chunk while its lines are taken from `lines`."""

    def __init__(
        self, batch: Batch, published: PublishedChunk, files: FileStore, workspace: Workspace, report: VerifyReport
    ) -> None:
        self._batch, self._published, self._files = batch, published, files
        self._workspace, self._report = workspace, report
        self._range = published.chunk.range
        self._digest, self._completed, self._gaps = AnswersDigest(), 0, 0
        self._path = workspace.result_path(batch.id, self._range.index, published.epoch)
        self._mend = rerun_chunk(batch.id, self._range.index)

    def lines(self) -> Iterator[ExpectedLine]:
        """Yield what the chunk gives to the merged files, in the order of the input file."""
        before = self._report.problem_count
        with ExitStack() as stack:
            index = stack.enter_context(self._workspace.index_path(self._batch.id).open("rb"))
            entries = read_entries(index, self._range.first_line, self._range.line_count)
            results = self._read_results()
            if results is None:
                yield from map(_unknown, entries)
                return
            journals = stack.enter_context(JournalReader(self._workspace, self._batch.id, self._range.index))
            source = self._open_source(stack)
            rows = zip(entries, results.entries, strict=True)
            for line, (entry, result) in enumerate(rows, self._range.first_line):
                yield self._expect(line, entry, result, results.reason, journals, source)
        if self._report.problem_count == before:
            self._conclude(results.reason)

    def _read_results(self) -> ResultIndex | None:
        try:
            with self._path.open("rb") as packed:
                results = read_results(packed)
        except (OSError, StorageFailure) as error:
            self._blame_result(f"the result index cannot be read: {error}", None, 0)
            return None
        if len(results.entries) != self._range.line_count:
            message = f"it has {len(results.entries)} entries for {self._range.line_count} lines"
            self._blame_result(message, None, _COUNT_AT)
            return None
        return results

    def _open_source(self, stack: ExitStack) -> BinaryIO | None:
        try:
            return stack.enter_context(self._files.open(self._batch.input_file_id))
        except NotFound:
            return None

    def _expect(
        self,
        line: int,
        entry: IndexEntry,
        result: ResultEntry,
        reason: str,
        journals: JournalReader,
        source: BinaryIO | None,
    ) -> ExpectedLine:
        self._report.checked["answers"] += result != NO_ANSWER
        if result == NO_ANSWER:
            return self._expect_gap(line, entry, reason, source)
        record = self._read(line, result, journals)
        if record is None:
            return _unknown(entry)
        if (problem := _disagreement(line, entry, result, record)) is not None:
            self._blame_result(problem, line + 1, self._entry_at(line))
            return _unknown(entry)
        self._digest.add(record)
        self._completed += record.ok
        rendered = render_answer(self._batch.id, record)
        return ExpectedLine(entry.offset, entry.id_hash, record.ok, rendered, True)

    def _expect_gap(self, line: int, entry: IndexEntry, reason: str, source: BinaryIO | None) -> ExpectedLine:
        """The text of these lines is ours, and may have been another one in an older version."""
        self._gaps += 1
        try:
            custom_id = custom_id_at(source, entry) if source else None
        except ValueError:
            custom_id = None  # the damage to the input is reported already
        rendered = render_unanswered(self._batch.id, line, custom_id, reason) if custom_id is not None else None
        return ExpectedLine(entry.offset, entry.id_hash, False, rendered, False)

    def _read(self, line: int, result: ResultEntry, journals: JournalReader) -> JournalRecord | None:
        try:
            return journals.read(result)
        except CorruptJournal:
            self._blame_record(line, result)
            return None

    def _blame_record(self, line: int, result: ResultEntry) -> None:
        """The record may be damaged, or what points at it: the result index tells by its own digest."""
        if self._is_result_changed:
            message = "the entry of this line points at no intact record of a journal"
            self._blame_result(message, line + 1, self._entry_at(line))
            return
        path = f"journal/{self._range.index:04d}/{result.epoch:06d}.jsonl"
        message = f"the answer of line {line + 1} is damaged"
        place = result.offset - HEAD_BYTES
        self._report.add(Problem(Kind.JOURNAL, path, message, self._mend, line + 1, place))

    @cached_property
    def _is_result_changed(self) -> bool:
        told = self._published.told
        if told is None:
            return False
        with self._path.open("rb") as packed:
            return digest_file("", packed).sha256 != told.result.sha256

    def _is_reason_right(self, reason: str) -> bool:
        summary = self._published.chunk.summary
        if not self._gaps or summary is None or self._published.epoch != self._published.chunk.published_epoch:
            return bool(reason) == bool(self._gaps)
        return reason in summary.error_codes

    def _entry_at(self, line: int) -> int:
        return _RESULT_HEADER_BYTES + (line - self._range.first_line) * _RESULT_ENTRY_BYTES

    def _blame_result(self, message: str, line: int | None, offset: int | None) -> None:
        self._report.add(Problem(Kind.RESULT, f"results/{self._path.name}", message, self._mend, line, offset))

    def _conclude(self, reason: str) -> None:
        """Compare what was read as a whole. `reason` is the code of the lines without an answer."""
        if self._is_result_changed or not self._is_reason_right(reason):
            self._blame_result("it is not as written, though every entry fits its answer", None, 0)
        if self._digest.hexdigest() != self._published.answers:
            self._blame_result("the answers have another digest than when the chunk was published", None, None)
        if self._completed != self._published.completed:
            self._blame_result(f"{self._completed} answers succeeded, not {self._published.completed}", None, None)


def _unknown(entry: IndexEntry) -> ExpectedLine:
    return ExpectedLine(entry.offset, entry.id_hash, None, None, True)


def _disagreement(line: int, entry: IndexEntry, result: ResultEntry, record: JournalRecord) -> str | None:
    """Return why an intact record is not the answer of this line, None when it is."""
    if record.line != line or hash_custom_id(record.custom_id) != entry.id_hash:
        return f"the entry of this line points at the answer of line {record.line + 1}"
    if result.outcome not in (SUCCEEDED, FAILED) or record.ok != (result.outcome == SUCCEEDED):
        return "the entry of this line tells another outcome than the answer"
    return None
