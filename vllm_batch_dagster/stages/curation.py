"""Writes the curated selection of a finished batch as a Parquet dataset, one folder per batch.

Called by the `curated_export` asset. Rows go to disk a few thousand at a time; the folder is replaced as a whole, so
a rerun doubles nothing.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import msgspec
import polars

from vllm_batch_dagster.core.curation import CuratedRow, CurationRules, make_row, refuse_row
from vllm_batch_dagster.core.models import Batch, Chunk
from vllm_batch_dagster.core.ports import BatchStore, FileStore, Workspace
from vllm_batch_dagster.stages.publication import sync_folder
from vllm_batch_dagster.stages.rows import answered_lines

ROWS_PER_PART = 5000
DATASET = "curated"


@dataclass(frozen=True, slots=True)
class CurationReport:
    """What was selected. `refused` counts rows by the rule that they broke; `bytes` on disk."""

    path: Path
    kept: int
    refused: dict[str, int]
    bytes: int


def curate_batch(
    batch: Batch, store: BatchStore, files: FileStore, workspace: Workspace, rules: CurationRules
) -> CurationReport:
    """Select from the merged results of `batch` and publish the dataset folder."""
    folder = workspace.dataset_path(DATASET, batch.id)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    refused: Counter[str] = Counter()
    rows = _kept_rows(batch, store.chunks.list(batch.id), files, workspace, rules, refused)
    kept = 0
    for number, part in enumerate(_parts(rows)):
        kept += len(part)
        path = fresh / f"part-{number:05d}.parquet"
        polars.DataFrame([asdict(row) for row in part]).write_parquet(path, compression="zstd")
    _replace(folder, fresh)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return CurationReport(folder, kept, dict(refused), size)


def _kept_rows(
    batch: Batch,
    chunks: Sequence[Chunk],
    files: FileStore,
    workspace: Workspace,
    rules: CurationRules,
    refused: Counter[str],
) -> Iterator[CuratedRow]:
    # 16 bytes a prompt: the one thing here that grows with the batch.
    seen: set[bytes] = set()
    for chunk in chunks:
        for line in answered_lines(batch, chunk, files, workspace):
            if not line.record.ok:
                refused["request_failed"] += 1
                continue
            try:
                row = make_row(batch.id, line.record.line, line.record.custom_id, line.request, bytes(line.record.body))
            except msgspec.DecodeError:
                refused["unreadable"] += 1
                continue
            key = bytes.fromhex(row.prompt_hash)
            reason = refuse_row(row, rules) or ("repeated_prompt" if key in seen else None)
            if reason is None:
                seen.add(key)
                yield row
            else:
                refused[reason] += 1


def _parts(rows: Iterator[CuratedRow]) -> Iterator[Sequence[CuratedRow]]:
    while part := list(islice(rows, ROWS_PER_PART)):
        yield part


def _replace(folder: Path, fresh: Path) -> None:
    """Put `fresh` in the place of `folder`. Killed in between, the next run finds `.new` and starts again."""
    for path in fresh.iterdir():
        sync_folder(path)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    sync_folder(folder.parent)
