"""Writes every answered line of a batch as a row for the rules of the curation, a few thousand to a file.

Called by stages/curation.py, which reads the files several times and removes them: no rule needs the batch in memory.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import polars

from vllm_batch_dagster.core.candidates import CandidateMaker, Line, schema
from vllm_batch_dagster.core.curation_rules import CurationRules
from vllm_batch_dagster.core.models import Batch, Chunk
from vllm_batch_dagster.core.ports import FileStore, Workspace
from vllm_batch_dagster.core.repair import said_texts, wanted_format
from vllm_batch_dagster.stages.rows import AnsweredLine, answered_lines
from vllm_batch_dagster.stages.schemas import SchemaChecker

ROWS_PER_PART = 5000
BYTES_PER_PART = 32 << 20
_TYPES = {str: polars.String, int: polars.Int64, float: polars.Float64, bool: polars.Boolean}
_TEXTS = polars.List(polars.String)


def write_candidates(
    batch: Batch,
    chunks: Sequence[Chunk],
    files: FileStore,
    workspace: Workspace,
    rules: CurationRules,
    folder: Path,
    refused: Counter[str],
) -> Sequence[Path]:
    """Write the rows of `batch` into `folder` and return the files, in order of the lines. What makes no row is counted
    in `refused`."""
    columns: dict[str, Any] = {name: _TYPES.get(kind, _TEXTS) for name, kind in schema(rules).items()}
    written: list[Path] = []
    for part in _parts(_rows(batch, chunks, files, workspace, rules, refused)):
        path = folder / f"part-{len(written):05d}.parquet"
        polars.DataFrame(part, schema=columns, orient="row").write_parquet(path, compression="zstd")
        written.append(path)
    return written


def _rows(
    batch: Batch,
    chunks: Sequence[Chunk],
    files: FileStore,
    workspace: Workspace,
    rules: CurationRules,
    refused: Counter[str],
) -> Iterator[dict[str, Any]]:
    maker, checker = CandidateMaker(rules, batch.metadata), SchemaChecker()
    for chunk in chunks:
        for line in answered_lines(batch, chunk, files, workspace):
            if not line.record.ok:
                refused["request_failed"] += 1
                continue
            try:
                yield maker.make(_to_line(batch, line, checker))
            except msgspec.DecodeError:
                refused["unreadable"] += 1


def _to_line(batch: Batch, line: AnsweredLine, checker: SchemaChecker) -> Line:
    answer = bytes(line.record.body)
    wanted = wanted_format(batch.endpoint, line.request)
    breaks = wanted is not None and not all(checker.fits(text, wanted) for text in said_texts(answer))
    return Line(batch.id, line.record.line, line.record.custom_id, line.request, answer, breaks)


def _parts(rows: Iterator[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    """Yield groups of rows that are bounded in number and in bytes: a line may have a megabyte."""
    part: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row["messages"]) + sum(map(len, row["answers"]))
        if len(part) >= ROWS_PER_PART or size >= BYTES_PER_PART:
            yield part
            part, size = [], 0
    if part:
        yield part
