"""`memory`: peak memory of the API process and of the runs as the batch grows, with a simulated engine behind."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.dagster_runs import runs_by_job
from bench.dataset import write_chat_file
from bench.figures import Figure, Result, Target, collect
from bench.plan import Plan
from bench.rss import WorkerPeaks, peak_of
from bench.stack import Stack, running_stack
from bench.terminal import say
from bench.trips import send_batch
from vllm_batch_dagster.adapters.simulated.process import SimulatedProcess

MODEL = "simulated"
MAX_TOKENS = 8
TARGETS = {"api": Target(50.0), "infer_chunks": Target(50.0)}
WATCHED = {
    "api": "API process",
    "infer_chunks": "chunk run",
    "validate_batch": "validate run",
    "finalize_batch": "finalize run",
}


def measure_memory(plan: Plan) -> Sequence[Result]:
    """Each size once, in rising order through one API process: its peak can only rise."""
    sizes = sorted(plan.sizes.memory)
    models = plan.folder / "simulated-models.yaml"
    models.write_text(f"models:\n  - name: {MODEL}\n    path: someone/{MODEL}\n")
    with (
        SimulatedProcess("--model", MODEL) as engine,
        running_stack(plan.folder / "memory", ENGINE_URL=engine.url, MODELS_FILE=str(models)) as stack,
    ):
        rows = [_measure(stack, plan, lines) for lines in sizes]
    return [_result(rows, {"engine": "simulated", "lines": sizes, "max_tokens": MAX_TOKENS})]


def _measure(stack: Stack, plan: Plan, lines: int) -> dict[str, Any]:
    say(f"memory: {lines} lines through the simulated engine")
    path = write_chat_file(plan.folder / f"memory-{lines}.jsonl", lines, MODEL, MAX_TOKENS)
    with WorkerPeaks(stack.pid_of("code")) as peaks:
        trip = send_batch(stack, path)
    runs = sorted(runs_by_job(stack.dagster_url, trip.batch_id).values(), key=lambda run: run.created)
    by_job = dict(zip((run.job for run in runs), peaks.in_order(len(runs)), strict=True))
    row = {"lines": lines, "api": peak_of(stack.pid_of("api")), **by_job, "seconds": trip.seconds}
    say("  " + ", ".join(f"{words} {row[key]:.0f} MB" for key, words in WATCHED.items()))
    return row


def _result(rows: Sequence[Mapping[str, Any]], setup: Mapping[str, Any]) -> Result:
    least, most = rows[0], rows[-1]
    span = f"{least['lines']} to {most['lines']} lines"
    growth = [
        Figure(f"{words}: growth from {span}", "MB", (most[key] - least[key],), TARGETS.get(key))
        for key, words in WATCHED.items()
    ]
    peaks = [
        collect(f"{words}: peak at {row['lines']} lines", "MB", [row], key)
        for key, words in WATCHED.items()
        for row in rows
    ]
    return Result(
        name="memory",
        title=f"peak resident memory from {span}, **simulated engine**",
        figures=(*growth, *peaks),
        setup=setup,
        raw=rows,
        notes=(
            "The engine is simulated: its answers are made up and cost nothing. Ours is real: upload, validation, "
            "inference, merge and download.",
            "VmHWM in units of 2^20 bytes, one batch per size, in rising order through the same API process; a run "
            "is a process of its own and is read every 0.1 s.",
        ),
    )
