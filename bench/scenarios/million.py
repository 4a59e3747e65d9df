"""`million`: a batch of a million lines through the simulated engine: memory of every process, and of `verify` too.

Not part of a plain `make bench`: it takes about a quarter of an hour.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from bench.dagster_runs import runs_by_job
from bench.dataset import write_chat_file
from bench.errors import BenchFailed
from bench.figures import Figure, Result, Target, collect
from bench.plan import Plan
from bench.rss import WorkerPeaks, peak_of, watch_peak
from bench.stack import Stack, running_stack
from bench.terminal import say
from bench.tracing import MemoryTraces
from bench.trips import send_batch
from vllm_batch_dagster.adapters.simulated.process import SimulatedProcess
from vllm_batch_dagster.cli.processes import run_workers

MODEL = "simulated"
MAX_TOKENS = 8
LIMIT_SECONDS = 7200
SERVICES = {"api": "API process", "code": "code server", "daemon": "daemon", "web": "webserver"}
RUNS = {"validate_batch": "validate run", "infer_chunks": "chunk run", "finalize_batch": "finalize run"}
PEAK, FLAT = Target(400.0), Target(50.0)


def measure_million(plan: Plan) -> Sequence[Result]:
    """Once: the sizes do not vary from run to run."""
    lines = plan.sizes.million
    models = plan.folder / "simulated-models.yaml"
    models.write_text(f"models:\n  - name: {MODEL}\n    path: someone/{MODEL}\n")
    path = write_chat_file(plan.folder / "million.jsonl", lines, MODEL, MAX_TOKENS)
    with (
        SimulatedProcess("--model", MODEL) as engine,
        running_stack(plan.folder / "million", ENGINE_URL=engine.url, MODELS_FILE=str(models)) as stack,
    ):
        say(f"million: {lines} lines through the simulated engine")
        row = _measure(stack, path)
    setup = {"engine": "simulated", "lines": lines, "max_tokens": MAX_TOKENS, "input_bytes": path.stat().st_size}
    path.unlink()
    return [_result(row, setup)]


def _measure(stack: Stack, path: Any) -> dict[str, Any]:
    code = stack.pid_of("code")
    results = stack.home / "batches"
    traces = MemoryTraces(
        {name: stack.pid_of(name) for name in SERVICES},
        lambda: newest(run_workers(code)),
        lambda: any(results.glob("*/results/*.idx")),
    )
    with WorkerPeaks(code) as peaks, traces:
        trip = send_batch(stack, path, limit=LIMIT_SECONDS)
    runs = sorted(runs_by_job(stack.dagster_url, trip.batch_id).values(), key=lambda run: run.created)
    began = dict(zip((run.job for run in runs), sorted(traces.workers), strict=True))
    first, last = stack.inference_span(trip.batch_id)
    return {
        "lines": stack.client.batches.retrieve(trip.batch_id).request_counts.total,
        "seconds": trip.seconds,
        "lines_per_s": len(stack.chunk_summaries(trip.batch_id)) and _rate(stack, trip.batch_id, first, last),
        **{run.job + "_wall": run.wall for run in runs},
        **{name: peak_of(stack.pid_of(name)) for name in SERVICES},
        **dict(zip((run.job for run in runs), peaks.in_order(len(runs)), strict=True)),
        "infer_growth": traces.workers[began["infer_chunks"]].growth_after(traces.first_chunk),
        **{f"{name}_growth": trace.growth_after(traces.first_chunk) for name, trace in traces.services.items()},
        **verify(stack, trip.batch_id),
    }


def _rate(stack: Stack, batch_id: str, first: float, last: float) -> float:
    return sum(summary.counts.total for summary in stack.chunk_summaries(batch_id)) / (last - first)


def newest(workers: Sequence[psutil.Process]) -> psutil.Process | None:
    """Return the run worker that began last: runs of one batch follow each other."""
    return max(workers, key=lambda worker: worker.pid, default=None)


def verify(stack: Stack, batch_id: str) -> dict[str, float]:
    """Run `vllm-batch verify` and return its seconds and its peak. Raises BenchFailed when it finds a problem."""
    began = time.monotonic()
    with (stack.folder / "verify.json").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_batch_dagster.cli", "verify", batch_id, "--json"],
            cwd=stack.folder,
            env=stack.env,
            stdout=output,
        )
        peak = watch_peak(process)
    report = json.loads((stack.folder / "verify.json").read_text())
    if process.returncode or not report["ok"]:
        raise BenchFailed(f"verify found a problem: {report['problems'][:3]}")
    return {"verify_s": time.monotonic() - began, "verify": peak}


def _result(row: Mapping[str, Any], setup: Mapping[str, Any]) -> Result:
    rows = [row]
    peaks = [
        collect(f"{words}: peak", "MB", rows, key, PEAK)
        for key, words in {**SERVICES, **RUNS, "verify": "`vllm-batch verify`"}.items()
    ]
    growth = [
        collect(f"{words}: growth after the first chunk", "MB", rows, key, FLAT)
        for key, words in {
            "infer_growth": "chunk run",
            "api_growth": "API process",
            "code_growth": "code server",
        }.items()
    ]
    times = [
        Figure("first line sent to last answer", "lines/s", (row["lines_per_s"],)),
        Figure("submit to output readable", "s", (row["seconds"],)),
        *(Figure(f"{words}: wall", "s", (row[f"{job}_wall"],)) for job, words in RUNS.items()),
        Figure("`vllm-batch verify`", "s", (row["verify_s"],)),
    ]
    return Result(
        name="million",
        title=f"memory of {row['lines']} lines in one batch, **simulated engine**",
        figures=(*peaks, *growth, *times),
        setup=setup,
        raw=rows,
        notes=(
            "The engine is simulated: its answers are made up and cost nothing. Ours is real: upload, validation, "
            "inference, merge, curation, download, verification.",
            "Peaks are the kernel's (VmHWM, 2^20 bytes), growth is of resident memory read every 0.2 s: the most after "
            "the first published chunk less the most before.",
        ),
    )
