"""The chunk and the attempt table in memory, with the same fence."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm_batch_dagster.adapters.memory.tables import Tables
from vllm_batch_dagster.adapters.store.rules import (
    ENGINE_FAILURE,
    PUBLISHED,
    SUPERSEDED,
    AttemptRecord,
    can_replan,
    stale,
)
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import Attempt, Chunk, ChunkRange, ChunkSummary, Usage


class MemoryChunkRecords:
    """See ChunkRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def plan(self, batch_id: str, ranges: Sequence[ChunkRange]) -> None:
        """Other ranges replace the planned ones until an attempt begins, then raise StateConflict.

        Raises NotFound for an unknown batch.
        """
        with self._tables.lock:
            if batch_id not in self._tables.batches:
                raise NotFound("batch", batch_id)
            known = self._tables.chunks_of(batch_id)
            if can_replan(batch_id, known, ranges):
                for chunk in known:
                    del self._tables.chunks[batch_id, chunk.index]
                self._tables.chunks.update({(batch_id, planned.index): Chunk(batch_id, planned) for planned in ranges})

    def list(self, batch_id: str) -> Sequence[Chunk]:
        with self._tables.lock:
            return self._tables.chunks_of(batch_id)

    def finished(self, model: str, limit: int) -> Sequence[Chunk]:
        with self._tables.lock:
            known = (
                chunk
                for batch in reversed(self._tables.batches.values())
                for chunk in self._tables.chunks_of(batch.id)
                if (chunk.range.model or batch.model) == model
            )
            return [chunk for chunk in known if chunk.is_published][:limit]

    def get(self, batch_id: str, index: int) -> Chunk:
        with self._tables.lock:
            try:
                return self._tables.chunks[batch_id, index]
            except KeyError:
                raise NotFound("chunk", f"{batch_id}/{index}") from None

    def begin(self, batch_id: str, index: int, *, fresh: bool, run_id: str, now: int) -> Attempt:
        """Raises NotFound. An older attempt that is still open ends as `superseded`."""
        with self._tables.lock:
            chunk = _next_epoch(self.get(batch_id, index), fresh)
            self._tables.chunks[batch_id, index] = chunk
            self._end(batch_id, index, SUPERSEDED, now, lambda record: record.ended_at is None)
            record = AttemptRecord(chunk.epoch, chunk.base_epoch, run_id, now)
            self._tables.attempts.setdefault((batch_id, index), []).append(record)
            return Attempt(batch_id, index, chunk.epoch, chunk.base_epoch, chunk.engine_failures)

    def report(self, attempt: Attempt, completed: int, failed: int, usage: Usage) -> None:
        """Does nothing once the attempt is published: its result holds. Raises NotFound for an unknown chunk."""
        with self._tables.lock:
            self._update_current(attempt, completed=completed, failed=failed, usage=usage)

    def publish(self, attempt: Attempt, summary: ChunkSummary, now: int) -> None:
        """Raises NotFound for an unknown chunk."""
        counts = summary.counts
        with self._tables.lock:
            if self._update_current(
                attempt,
                published_epoch=attempt.epoch,
                summary=summary,
                completed=counts.completed,
                failed=counts.failed,
                usage=summary.usage,
            ):
                batch = self._tables.batches[attempt.batch_id]
                self._tables.batches[batch.id] = replace(batch, result_version=batch.result_version + 1)
                self._end(batch.id, attempt.index, PUBLISHED, now, lambda record: record.epoch == attempt.epoch)

    def give_back(self, attempt: Attempt, outcome: str, now: int) -> None:
        """The first outcome that an attempt itself gives is kept. Raises NotFound for an unknown chunk."""

        def is_unsettled(record: AttemptRecord) -> bool:
            return record.epoch == attempt.epoch and record.outcome in (None, SUPERSEDED)

        with self._tables.lock:
            chunk = self.get(attempt.batch_id, attempt.index)
            ended = self._end(attempt.batch_id, attempt.index, outcome, now, is_unsettled)
            if ended and outcome == ENGINE_FAILURE and chunk.epoch == attempt.epoch:
                self._update_current(attempt, engine_failures=chunk.engine_failures + 1)

    def attempts(self, batch_id: str, index: int) -> Sequence[AttemptRecord]:
        """The history of a chunk, oldest attempt first; empty for an unknown one."""
        with self._tables.lock:
            return tuple(self._tables.attempts.get((batch_id, index), ()))

    def _update_current(self, attempt: Attempt, **columns: Any) -> bool:
        """Change the chunk unless `attempt` is published already; say whether it was changed. Raises StaleAttempt."""
        chunk = self.get(attempt.batch_id, attempt.index)
        if chunk.epoch != attempt.epoch:
            raise stale(attempt, chunk.epoch)
        if chunk.published_epoch == attempt.epoch:
            return False
        self._tables.chunks[chunk.batch_id, chunk.index] = replace(chunk, **columns)
        return True

    def _end(self, batch_id: str, index: int, outcome: str, now: int, wanted: Callable[[AttemptRecord], bool]) -> bool:
        """Close the attempts of a chunk that are `wanted`; say whether there was one."""
        history = self._tables.attempts.get((batch_id, index), [])
        places = [place for place, record in enumerate(history) if wanted(record)]
        for place in places:
            history[place] = replace(history[place], ended_at=now, outcome=outcome)
        return bool(places)


def _next_epoch(chunk: Chunk, fresh: bool) -> Chunk:
    following = replace(chunk, epoch=chunk.epoch + 1)
    if not fresh:
        return replace(following, base_epoch=chunk.base_epoch or 1)
    return replace(following, base_epoch=following.epoch, engine_failures=0, completed=0, failed=0, usage=Usage())
