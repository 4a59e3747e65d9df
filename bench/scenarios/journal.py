"""`journal`: what the row journal costs, against no journal at all, at 2,000 lines per second.

The infer stage runs in this process, with its real adapters: SQLite, local files, the HTTP client. The simulated
engine is paced, so that both sides are offered the same. Without a journal, answers are dropped where they would be
written and the chunk's result is not built from them: that exists only here.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.dataset import write_chat_file
from bench.errors import BenchFailed
from bench.figures import Result, Target, collect
from bench.plan import Plan
from bench.terminal import say
from vllm_batch_dagster.adapters.engine import connect_engines
from vllm_batch_dagster.adapters.local_files import LocalFiles, LocalWorkspace
from vllm_batch_dagster.adapters.memory import MemoryCatalog
from vllm_batch_dagster.adapters.simulated.process import SimulatedProcess
from vllm_batch_dagster.adapters.store import open_store
from vllm_batch_dagster.core.creation import FileFacts
from vllm_batch_dagster.core.models import Batch, Chunk, ChunkSummary, Model, RequestCounts, Usage
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.stages import attempts
from vllm_batch_dagster.stages.inference import InferencePolicy, InferencePorts, RangeInference
from vllm_batch_dagster.stages.intake import create_batch, receive_file
from vllm_batch_dagster.stages.validation import ValidationLimits, validate_batch

MODEL = Model("simulated", "someone/simulated")
CHUNK_LINES = 5000
SEQS, LATENCY = 128, 0.064  # 128 at once, 64 ms each: 2,000 a second
COST = Target(3.0)
CHAT = "/v1/chat/completions"


class NullJournal:
    """Takes answers and forgets them."""

    def __init__(self, _path: Path) -> None:
        pass

    def write(self, records: Sequence[bytes]) -> None:
        pass

    def close(self) -> None:
        pass


def null_seal(_workspace: object, chunk: Chunk, _attempt: object, **_told: object) -> ChunkSummary:
    """Say that all lines succeeded, without a look."""
    lines = chunk.range.line_count
    return ChunkSummary(RequestCounts(lines, lines, 0), Usage())


@contextmanager
def without_journal() -> Iterator[None]:
    with patch.object(attempts, "JournalWriter", NullJournal), patch.object(attempts, "seal_chunk", null_seal):
        yield


class Bench:
    """An installation without processes of its own, but for the engine."""

    def __init__(self, folder: Path, url: str) -> None:
        folder.mkdir(parents=True)
        self.store: BatchStore = open_store(f"sqlite:///{folder / 'batches.db'}")
        self.files = LocalFiles(folder / "files")
        self.workspace = LocalWorkspace(folder / "batches", folder / "datasets")
        self.engines = connect_engines(url, max_num_seqs=SEQS)

    def validated(self, path: Path) -> Batch:
        with path.open("rb") as source:
            blocks = iter(lambda: source.read(1 << 20), b"")
            facts = FileFacts(path.name, "batch")
            file = receive_file(
                blocks, facts, store=self.store, files=self.files, clock=time.time, randomness=os.urandom
            )
        params = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
        batch = create_batch(params, store=self.store, clock=time.time, randomness=os.urandom)
        limits = ValidationLimits(chunk_size=CHUNK_LINES, chunk_slots=40)
        ports = (self.store, self.files, self.workspace, MemoryCatalog([MODEL]))
        report = validate_batch(batch, *ports, limits, time.time)
        if report.errors:
            raise BenchFailed(str(report.errors[0]))
        return self.store.batches.get(batch.id)

    def infer(self, batch: Batch) -> float:
        """Run all chunks, and return the seconds from the begin of the first to the end of the last."""
        marks: list[float] = []

        def mark(_: object) -> None:
            marks.append(time.monotonic())

        ports = InferencePorts(self.store, self.files, self.workspace, self.engines, time.time)
        chunks = self.store.chunks.list(batch.id)
        range_inference = RangeInference(
            ports,
            InferencePolicy(),
            batch,
            MODEL,
            chunks,
            fresh=frozenset(),
            run_id="bench",
            on_done=mark,
            report=lambda sentence: mark(sentence) if sentence.startswith("chunk ") else None,
        )
        asyncio.run(range_inference.run())
        return marks[-1] - marks[0]


def measure_journal(plan: Plan) -> Sequence[Result]:
    lines = plan.sizes.journal
    path = write_chat_file(plan.folder / "journal.jsonl", lines, MODEL.name, 8)
    with (
        SimulatedProcess("--model", MODEL.name, "--max-num-seqs", str(SEQS), "--latency", str(LATENCY)) as paced,
        SimulatedProcess("--model", MODEL.name, "--max-num-seqs", str(SEQS)) as fast,
    ):
        paced_bench, fast_bench = Bench(plan.folder / "paced", paced.url), Bench(plan.folder / "fast", fast.url)
        _run(fast_bench, path, lines, with_journal=True)  # imports, first connections, first pages of the disk
        rows = [
            _repeat(bench, path, lines, name, number)
            for number in range(plan.runs)
            for name, bench in (("paced", paced_bench), ("fast", fast_bench))
        ]
    setup = {"engine": "simulated", "lines": lines, "chunk_lines": CHUNK_LINES, "seqs": SEQS, "latency_s": LATENCY}
    return [_result(rows, setup)]


def _repeat(bench: Bench, path: Path, lines: int, name: str, number: int) -> dict[str, Any]:
    """Both sides, the other one first every second time."""
    say(f"journal {number + 1}: {lines} lines, {name}")
    order = (True, False) if number % 2 == 0 else (False, True)
    sides = {with_journal: _run(bench, path, lines, with_journal=with_journal) for with_journal in order}
    (with_rate, with_cpu), (without_rate, without_cpu) = sides[True], sides[False]
    return {
        "pace": name,
        "with": with_rate,
        "without": without_rate,
        "cost": (1 - with_rate / without_rate) * 100,
        "cpu_with": with_cpu,
        "cpu_without": without_cpu,
    }


def _run(bench: Bench, path: Path, lines: int, *, with_journal: bool) -> tuple[float, float]:
    """Return (lines per second, CPU milliseconds of ours per line)."""
    batch = bench.validated(path)
    cpu = time.process_time()
    if with_journal:
        seconds = bench.infer(batch)
    else:
        with without_journal():
            seconds = bench.infer(batch)
    return lines / seconds, (time.process_time() - cpu) * 1000 / lines


def _result(rows: Sequence[dict[str, Any]], setup: dict[str, Any]) -> Result:
    paced = [row for row in rows if row["pace"] == "paced"]
    fast = [row for row in rows if row["pace"] == "fast"]
    return Result(
        name="journal",
        title=f"what the journal costs: {setup['lines']} lines, **simulated engine** paced to 2,000 lines/s",
        figures=(
            collect("throughput lost to the journal at 2,000 lines/s", "%", paced, "cost", COST),
            collect("with the journal", "lines/s", paced, "with"),
            collect("without any journal", "lines/s", paced, "without"),
            collect("our CPU time with the journal", "ms/line", paced, "cpu_with"),
            collect("our CPU time without", "ms/line", paced, "cpu_without"),
            collect("engine as fast as it can: with the journal", "lines/s", fast, "with"),
            collect("engine as fast as it can: without", "lines/s", fast, "without"),
            collect("engine as fast as it can: throughput lost", "%", fast, "cost"),
        ),
        setup=setup,
        raw=rows,
        notes=(
            "The infer stage alone, in one process, on the disk of the temporary folder: from the begin of the first "
            "chunk until the last is published. Sides take turns.",
            "Without a journal, the answers are dropped and nothing is sealed. The journal's side writes, fsyncs, "
            "reads back and seals.",
        ),
    )
