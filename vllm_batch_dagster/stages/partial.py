"""Reads the finished lines of a batch while it runs, straight from the journals, each line once per reader.

Called by GET /v1/batches/{id}/results. With failed requests, the lines that lenient validation refused come first. Then
lines come chunk by chunk and in order of arrival within a chunk; where a reader stands is a ResultCursor. Nothing is
written, and only one line and one byte per line of an open chunk are held.
"""

from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path

from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.journal import read_records
from vllm_batch_dagster.core.merging import render_answer, render_rejection
from vllm_batch_dagster.core.models import Batch, Chunk, RequestCounts
from vllm_batch_dagster.core.partial import Places, ResultCursor, read_cursor, unknown_cursor
from vllm_batch_dagster.core.ports import BatchStore, FileStore, Workspace
from vllm_batch_dagster.core.rejections import read_rejections
from vllm_batch_dagster.stages.merging import merged_lines

BLOCK_BYTES = 256 << 10
_TAIL_BYTES = 64 << 10


class OpenChunk:
    """A chunk of which a reader has not had every line. `places`: attempt -> bytes read; `first`: oldest attempt."""

    def __init__(self, chunk: Chunk) -> None:
        self.first = chunk.base_epoch
        self.places: dict[int, int] = {}
        self.seen = bytearray(chunk.range.line_count)


class PartialResults:
    """One reader of one batch. Not thread-safe, but its calls may come from different threads in turn.

    Raises InvalidInput for a cursor that is not of this batch.
    """

    def __init__(
        self,
        batch: Batch,
        store: BatchStore,
        files: FileStore,
        workspace: Workspace,
        *,
        after: str = "",
        with_errors: bool = False,
    ) -> None:
        self._batch, self._store, self._files, self._workspace = batch, store, files, workspace
        self._with_errors = with_errors
        self._refused = 0
        self._done: set[int] = set()
        self._open: dict[int, OpenChunk] = {}
        self._seen_counts: RequestCounts | None = None
        self._limits: dict[tuple[int, int], int] | None = None
        self._sweep: Iterator[bytes] = iter(())
        self._is_between_places = False
        if after:
            self._restore(after)

    @property
    def cursor(self) -> ResultCursor | None:
        """Where the reader stands; None in the middle of what has no places: lines without an answer."""
        if self._is_between_places:
            return None
        opened = {index: dict(part.places) for index, part in self._open.items() if part.places}
        return ResultCursor(frozenset(self._done), opened, self._refused)

    def refresh(self) -> bool:
        """Look whether there is more, for `next_block`. Returns True when the batch has ended: it was the last look.

        An open batch that has not moved costs one query. Raises NotFound when the batch is gone.
        """
        self._batch = self._store.batches.get(self._batch.id)
        if self._batch.is_terminal or self._batch.counts != self._seen_counts:
            self._seen_counts = self._batch.counts
            self._sweep = self._lines()
        return self._batch.is_terminal

    def freeze(self) -> ResultCursor:
        """Give, with `next_block`, only what is there now. Returns where the reader will stand then."""
        self._batch = self._store.batches.get(self._batch.id)
        self._limits = {}
        done, opened = set(self._done), {index: dict(part.places) for index, part in self._open.items()}
        for chunk in self._chunks():
            places = opened.setdefault(chunk.index, {})
            for epoch, path in self._journals(chunk):
                places[epoch] = self._limits[chunk.index, epoch] = _last_end(path)
            if self._ends_with(chunk) or _is_answered(chunk):
                done.add(chunk.index)
                del opened[chunk.index]
        self._sweep = self._lines()
        return ResultCursor(frozenset(done), opened, self._batch.rejected if self._with_errors else self._refused)

    def next_block(self) -> bytes:
        """Return the next lines, about a quarter of a megabyte of them; empty when there are no more for now."""
        block = bytearray()
        for line in self._sweep:
            block += line
            if len(block) >= BLOCK_BYTES:
                break
        return bytes(block)

    def close(self) -> None:
        """Close what a cut-off reading has open."""
        self._sweep = iter(())

    def _restore(self, text: str) -> None:
        cursor = read_cursor(text)
        chunks = {chunk.index: chunk for chunk in self._store.chunks.list(self._batch.id)}
        if cursor.refused > self._batch.rejected or not chunks.keys() >= cursor.done | cursor.open.keys():
            raise unknown_cursor(text)
        self._refused = cursor.refused
        self._done = set(cursor.done)
        for index, places in cursor.open.items():
            chunk = chunks[index]
            part = self._open[index] = OpenChunk(chunk)
            part.first = min(places)
            if part.first < 1 or max(places) > chunk.epoch or not self._mark(chunk, part, places):
                raise unknown_cursor(text)

    def _mark(self, chunk: Chunk, part: OpenChunk, places: Places) -> bool:
        """Mark the lines that stand before `places`. Returns False when no record ends there."""
        part.places.update(places)
        for epoch, offset in places.items():
            path = self._workspace.journal_path(chunk.batch_id, chunk.index, epoch)
            if offset and not (path.exists() and _last_end(path, offset) == offset):
                return False
            with path.open("rb") if offset else BytesIO() as journal:
                for placed in read_records(journal):
                    if placed.end > offset:
                        break
                    if placed.record.is_final:
                        part.seen[placed.record.line - chunk.range.first_line] = 1
        return True

    def _chunks(self) -> Iterator[Chunk]:
        """Yield the begun chunks of which there may be more."""
        for chunk in self._store.chunks.list(self._batch.id):
            if chunk.epoch and chunk.index not in self._done:
                yield chunk

    def _journals(self, chunk: Chunk) -> Iterator[tuple[int, Path]]:
        """Yield (attempt, journal), oldest first. A reader keeps to the attempts that counted when it came."""
        part = self._open.get(chunk.index)
        for epoch in range(part.first if part else chunk.base_epoch, chunk.epoch + 1):
            path = self._workspace.journal_path(chunk.batch_id, chunk.index, epoch)
            if path.exists():
                yield epoch, path

    def _ends_with(self, chunk: Chunk) -> bool:
        """True when this look gives every line of the chunk: those without an answer too."""
        return self._with_errors and self._batch.is_terminal and chunk.is_published

    def _lines(self) -> Iterator[bytes]:
        """Yield what is new, and move the places along with each line."""
        if self._with_errors:
            yield from self._refused_lines()
        for chunk in self._chunks():
            for epoch, path in self._journals(chunk):
                yield from self._read(chunk, epoch, path)
            part = self._open.get(chunk.index)
            if self._ends_with(chunk):
                yield from self._unanswered(chunk, part)
            elif part is None or not all(part.seen):
                continue
            self._done.add(chunk.index)
            self._open.pop(chunk.index, None)
            self._is_between_places = False

    def _refused_lines(self) -> Iterator[bytes]:
        """Yield the error lines of what validation refused, as far as the reader has not had them."""
        if self._refused >= self._batch.rejected:
            return
        with self._workspace.index_path(self._batch.id).open("rb") as index:
            for rejection in islice(read_rejections(index), self._refused, None):
                self._refused += 1
                yield render_rejection(self._batch.id, rejection)

    def _read(self, chunk: Chunk, epoch: int, path: Path) -> Iterator[bytes]:
        part = self._open.setdefault(chunk.index, OpenChunk(chunk))
        limit = self._limits.get((chunk.index, epoch), 0) if self._limits is not None else None
        with path.open("rb") as journal:
            for placed in read_records(journal, part.places.get(epoch, 0)):
                if limit is not None and placed.end > limit:
                    return
                part.places[epoch] = placed.end
                position = placed.record.line - chunk.range.first_line
                if placed.record.is_final and not part.seen[position]:
                    part.seen[position] = 1
                    if placed.record.ok or self._with_errors:
                        yield render_answer(self._batch.id, placed.record)

    def _unanswered(self, chunk: Chunk, part: OpenChunk | None) -> Iterator[bytes]:
        """Yield the error lines of requests that nobody answered. Without the input file they cannot be named."""
        seen = part.seen if part else bytearray(chunk.range.line_count)
        with suppress(NotFound):
            merged = merged_lines(self._batch, chunk, self._files, self._workspace)
            for had, (_ok, line) in zip(seen, merged, strict=True):
                if not had:
                    self._is_between_places = True
                    yield line


def _is_answered(chunk: Chunk) -> bool:
    """True when the journals that the chunk's result was made of hold an answer to every line."""
    summary = chunk.summary
    return summary is not None and not chunk.is_unfinished and summary.replayed + summary.sent >= chunk.range.line_count


def _last_end(path: Path, most: int | None = None) -> int:
    """Return the offset behind the last whole record of a journal, or of its first `most` bytes."""
    size = path.stat().st_size
    end = size if most is None else min(size, most)
    with path.open("rb") as journal:
        while end > 0:
            start = max(0, end - _TAIL_BYTES)
            journal.seek(start)
            found = journal.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0
