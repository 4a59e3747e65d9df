"""Between the values of the core and the rows of the tables. Pure: no connection, no statement."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import msgspec
from sqlalchemy import RowMapping

from vllm_batch_dagster.core.models import (
    Attempt,
    Batch,
    Chunk,
    ChunkRange,
    ChunkSummary,
    File,
    LineError,
    RepairCounts,
    RequestCounts,
    Usage,
)
from vllm_batch_dagster.core.states import BatchStatus

# Fields of Batch that are JSON in their column, with the type to read them back as.
_DOCUMENTS: dict[str, Any] = {
    "metadata": dict[str, str] | None,
    "errors": tuple[LineError, ...],
    "usage": Usage | None,
    "repairs": RepairCounts | None,
}
_TOKENS = tuple(field.name for field in fields(Usage))
MIRRORED = ("completed", "failed", *_TOKENS)  # columns of a chunk that add up to what an open batch shows
_BATCH_FIELDS = tuple(field.name for field in fields(Batch) if field.name != "counts")


def file_row(file: File) -> dict[str, Any]:
    return asdict(file)


def read_file(row: RowMapping) -> File:
    return File(
        id=row["id"],
        bytes=row["bytes"],
        created_at=row["created_at"],
        filename=row["filename"],
        purpose=row["purpose"],
        sha256=row["sha256"],
        expires_at=row["expires_at"],
        project_id=row["project_id"],
    )


def batch_row(batch: Batch) -> dict[str, Any]:
    return to_columns({name: getattr(batch, name) for name in (*_BATCH_FIELDS, "counts")})


def to_columns(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the column values for fields of Batch. `counts` becomes three columns."""
    columns = {name: _to_column(name, value) for name, value in changes.items() if name != "counts"}
    if (counts := changes.get("counts")) is not None:
        columns |= {"total": counts.total, "completed": counts.completed, "failed": counts.failed}
    return columns


def _to_column(name: str, value: Any) -> Any:
    if name in _DOCUMENTS:
        return _to_json(value)
    return value.value if isinstance(value, BatchStatus) else value


def _to_json(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value, enc_hook=dict).decode()


def read_batch(row: RowMapping) -> Batch:
    values = {name: row[name] for name in _BATCH_FIELDS}
    for name, kind in _DOCUMENTS.items():
        if values[name] is not None:
            values[name] = msgspec.json.decode(values[name], type=kind)
    values["status"] = BatchStatus(values["status"])
    values["counts"] = RequestCounts(row["total"], row["completed"], row["failed"])
    return Batch(**values)


def show_progress(batch: Batch, sums: RowMapping) -> Batch:
    """Return an open batch with the sums of what its chunks mirror."""
    # int(): PostgreSQL adds bigints up to a decimal.
    counts = RequestCounts(batch.counts.total, int(sums["completed"]), batch.rejected + int(sums["failed"]))
    return replace(batch, counts=counts, usage=Usage(*(int(sums[name]) for name in _TOKENS)))


def range_row(batch_id: str, planned: ChunkRange) -> dict[str, Any]:
    """Return the row of a chunk that no attempt has touched."""
    row = {
        "batch_id": batch_id,
        "idx": planned.index,
        "first_line": planned.first_line,
        "line_count": planned.line_count,
        "offset": planned.offset,
        "length": planned.length,
        "model": planned.model,
    }
    return row | dict.fromkeys(("epoch", "base_epoch", "published_epoch", "engine_failures", *MIRRORED), 0)


def progress_columns(completed: int, failed: int, usage: Usage) -> dict[str, Any]:
    return {"completed": completed, "failed": failed, **asdict(usage)}


def summary_columns(summary: ChunkSummary) -> dict[str, Any]:
    counts = summary.counts
    return {"summary": _to_json(summary), **progress_columns(counts.completed, counts.failed, summary.usage)}


def read_chunk(row: RowMapping) -> Chunk:
    summary = row["summary"]
    return Chunk(
        batch_id=row["batch_id"],
        range=ChunkRange(row["idx"], row["first_line"], row["line_count"], row["offset"], row["length"], row["model"]),
        epoch=row["epoch"],
        base_epoch=row["base_epoch"],
        published_epoch=row["published_epoch"],
        engine_failures=row["engine_failures"],
        completed=row["completed"],
        failed=row["failed"],
        usage=Usage(*(row[name] for name in _TOKENS)),
        summary=None if summary is None else msgspec.json.decode(summary, type=ChunkSummary),
    )


def read_attempt(row: RowMapping) -> Attempt:
    return Attempt(row["batch_id"], row["idx"], row["epoch"], row["base_epoch"], row["engine_failures"])
