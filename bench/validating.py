"""One validation in a process of its own, on one core: `python -m bench.validating FILE FOLDER` prints a JSON object.

Run by the scenario `validation`. What runs is what the `validated_input` asset calls, with the real stores.
"""

import json
import os
import sys
import time
from pathlib import Path

from bench.rss import peak_of
from vllm_batch_dagster.adapters.local_files import LocalFiles, LocalWorkspace
from vllm_batch_dagster.adapters.memory.catalog import MemoryCatalog
from vllm_batch_dagster.adapters.store import open_store
from vllm_batch_dagster.core.creation import FileFacts
from vllm_batch_dagster.core.models import Batch, Model
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.stages.intake import create_batch, receive_file
from vllm_batch_dagster.stages.validation import ValidationLimits, validate_batch

MODEL = "simulated"
_BLOCK = 1 << 20


def main(path: Path, folder: Path) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    store, files = open_store(f"sqlite:///{folder / 'batches.db'}"), LocalFiles(folder / "files")
    batch = _submit(path, store, files)
    before = peak_of(os.getpid())
    wall, processor = time.perf_counter(), time.process_time()
    report = validate_batch(
        batch,
        store,
        files,
        LocalWorkspace(folder / "batches", folder / "datasets"),
        MemoryCatalog([Model(name=MODEL, path=MODEL)]),
        ValidationLimits(chunk_size=5000, chunk_slots=40),
        time.time,
    )
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    row = {"lines": report.lines, "bytes": report.bytes, "errors": len(report.errors), "seconds": wall}
    print(json.dumps({**row, "cpu_seconds": processor, "peak": peak_of(os.getpid()), "before": before}))


def _submit(path: Path, store: BatchStore, files: LocalFiles) -> Batch:
    """Store the file and a batch of it, as the API does."""
    with path.open("rb") as file:
        blocks = iter(lambda: file.read(_BLOCK), b"")
        facts = FileFacts(path.name, "batch", None)
        stored = receive_file(blocks, facts, store=store, files=files, clock=time.time, randomness=os.urandom)
    params = {"input_file_id": stored.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return create_batch(params, store, time.time, os.urandom)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
