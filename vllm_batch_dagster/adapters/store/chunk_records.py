"""The chunk and the attempt table. The epoch is the fence: only the newest attempt at a chunk may report or publish."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, case, delete, func, insert, select, update

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.rows import (
    MIRRORED,
    progress_columns,
    range_row,
    read_attempt,
    read_chunk,
    summary_columns,
)
from vllm_batch_dagster.adapters.store.rules import (
    ENGINE_FAILURE,
    PUBLISHED,
    SUPERSEDED,
    AttemptRecord,
    can_replan,
    stale,
)
from vllm_batch_dagster.adapters.store.schema import attempts, batches, chunks
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import Attempt, Chunk, ChunkRange, ChunkSummary, Usage


class SqlChunkRecords:
    """See ChunkRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def plan(self, batch_id: str, ranges: Sequence[ChunkRange]) -> None:
        """Other ranges replace the planned ones until an attempt begins, then raise StateConflict.

        Raises NotFound for an unknown batch.
        """
        with self._database.writing() as connection:
            _lock_batch(connection, batch_id)
            if can_replan(batch_id, _fetch_all(connection, batch_id), ranges):
                connection.execute(delete(chunks).where(chunks.c.batch_id == batch_id))
                if ranges:
                    connection.execute(insert(chunks), [range_row(batch_id, planned) for planned in ranges])

    def list(self, batch_id: str) -> Sequence[Chunk]:
        with self._database.reading() as connection:
            return _fetch_all(connection, batch_id)

    def finished(self, model: str, limit: int) -> Sequence[Chunk]:
        published = (func.coalesce(chunks.c.model, batches.c.model) == model) & (chunks.c.published_epoch > 0)
        found = select(chunks).join(batches, batches.c.id == chunks.c.batch_id).where(published)
        query = found.order_by(batches.c.seq.desc(), chunks.c.idx).limit(limit)
        with self._database.reading() as connection:
            return [read_chunk(row) for row in connection.execute(query).mappings()]

    def get(self, batch_id: str, index: int) -> Chunk:
        with self._database.reading() as connection:
            return _fetch(connection, batch_id, index)

    def begin(self, batch_id: str, index: int, *, fresh: bool, run_id: str, now: int) -> Attempt:
        """Raises NotFound. An older attempt that is still open ends as `superseded`."""
        with self._database.writing() as connection:
            moved = update(chunks).where(_is_chunk(batch_id, index)).values(_begin_columns(fresh))
            row = connection.execute(moved.returning(*chunks.c)).mappings().one_or_none()
            if row is None:
                raise NotFound("chunk", f"{batch_id}/{index}")
            attempt = read_attempt(row)
            _end(connection, attempt, SUPERSEDED, now, _is_older(attempt), attempts.c.ended_at.is_(None))
            connection.execute(insert(attempts), _attempt_row(attempt, run_id, now))
            return attempt

    def report(self, attempt: Attempt, completed: int, failed: int, usage: Usage) -> None:
        """Does nothing once the attempt is published: its result holds. Raises NotFound for an unknown chunk."""
        with self._database.writing() as connection:
            if not _update_current(connection, attempt, progress_columns(completed, failed, usage)):
                _refuse_stale(connection, attempt)

    def publish(self, attempt: Attempt, summary: ChunkSummary, now: int) -> None:
        """Raises NotFound for an unknown chunk."""
        with self._database.writing() as connection:
            columns = {"published_epoch": attempt.epoch, **summary_columns(summary)}
            if not _update_current(connection, attempt, columns):
                _refuse_stale(connection, attempt)
                return
            raised = {"result_version": batches.c.result_version + 1}
            connection.execute(update(batches).where(batches.c.id == attempt.batch_id).values(raised))
            _end(connection, attempt, PUBLISHED, now, attempts.c.epoch == attempt.epoch)

    def give_back(self, attempt: Attempt, outcome: str, now: int) -> None:
        """The first outcome that an attempt itself gives is kept. Raises NotFound for an unknown chunk."""
        unsettled = attempts.c.outcome.is_(None) | (attempts.c.outcome == SUPERSEDED)
        with self._database.writing() as connection:
            # The chunk's row first, as in every other method: two orders of locking could block each other.
            _fetch(connection, attempt.batch_id, attempt.index, lock=True)
            ended = _end(connection, attempt, outcome, now, attempts.c.epoch == attempt.epoch, unsettled)
            if ended and outcome == ENGINE_FAILURE:
                raised = {"engine_failures": chunks.c.engine_failures + 1}
                _update_current(connection, attempt, raised)

    def attempts(self, batch_id: str, index: int) -> Sequence[AttemptRecord]:
        """The history of a chunk, oldest attempt first; empty for an unknown one."""
        columns = (attempts.c[name] for name in AttemptRecord.__slots__)
        of_chunk = (attempts.c.batch_id == batch_id) & (attempts.c.idx == index)
        query = select(*columns).where(of_chunk).order_by(attempts.c.epoch)
        with self._database.reading() as connection:
            return [AttemptRecord(*row) for row in connection.execute(query)]


def _is_chunk(batch_id: str, index: int) -> ColumnElement[bool]:
    return (chunks.c.batch_id == batch_id) & (chunks.c.idx == index)


def _fetch_all(connection: Connection, batch_id: str) -> list[Chunk]:
    query = select(chunks).where(chunks.c.batch_id == batch_id).order_by(chunks.c.idx)
    return [read_chunk(row) for row in connection.execute(query).mappings()]


def _fetch(connection: Connection, batch_id: str, index: int, *, lock: bool = False) -> Chunk:
    query = select(chunks).where(_is_chunk(batch_id, index))
    row = connection.execute(_locked(query) if lock else query).mappings().one_or_none()
    if row is None:
        raise NotFound("chunk", f"{batch_id}/{index}")
    return read_chunk(row)


def _locked(query: Select[Any]) -> Select[Any]:
    """PostgreSQL locks the rows; SQLite's dialect leaves the clause out, as the whole file is locked already."""
    return query.with_for_update()


def _lock_batch(connection: Connection, batch_id: str) -> None:
    query = select(batches.c.id).where(batches.c.id == batch_id)
    if connection.execute(_locked(query)).one_or_none() is None:
        raise NotFound("batch", batch_id)


def _begin_columns(fresh: bool) -> dict[str, Any]:
    following = chunks.c.epoch + 1
    if fresh:
        restarted = dict.fromkeys(("engine_failures", *MIRRORED), 0)
        return {"epoch": following, "base_epoch": following, **restarted}
    first = case((chunks.c.base_epoch == 0, 1), else_=chunks.c.base_epoch)
    return {"epoch": following, "base_epoch": first}


def _attempt_row(attempt: Attempt, run_id: str, now: int) -> dict[str, Any]:
    return {
        "batch_id": attempt.batch_id,
        "idx": attempt.index,
        "epoch": attempt.epoch,
        "base_epoch": attempt.base_epoch,
        "run_id": run_id,
        "begun_at": now,
    }


def _update_current(connection: Connection, attempt: Attempt, columns: dict[str, Any]) -> bool:
    """Change the chunk if `attempt` is its newest one and not published; say whether it was changed."""
    current = (chunks.c.epoch == attempt.epoch) & (chunks.c.published_epoch != attempt.epoch)
    changed = update(chunks).where(_is_chunk(attempt.batch_id, attempt.index), current).values(columns)
    return bool(connection.execute(changed).rowcount)


def _refuse_stale(connection: Connection, attempt: Attempt) -> None:
    """Raises StaleAttempt when a newer attempt has begun. Otherwise this one is published: nothing is left to do."""
    newest = _fetch(connection, attempt.batch_id, attempt.index).epoch
    if newest != attempt.epoch:
        raise stale(attempt, newest)


def _is_older(attempt: Attempt) -> ColumnElement[bool]:
    return attempts.c.epoch < attempt.epoch


def _end(connection: Connection, attempt: Attempt, outcome: str, now: int, *conditions: ColumnElement[bool]) -> bool:
    """Close the attempts of the chunk that meet `conditions`; say whether there was one."""
    of_chunk = (attempts.c.batch_id == attempt.batch_id) & (attempts.c.idx == attempt.index)
    closed = update(attempts).where(of_chunk, *conditions).values(ended_at=now, outcome=outcome)
    return bool(connection.execute(closed).rowcount)
