"""`latency`: where the time of a small warm batch goes, part by part, against the pure inference of the same lines."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.dagster_runs import Run, runs_by_job
from bench.dataset import read_bodies
from bench.direct import infer_directly
from bench.figures import Figure, Result, Target, collect
from bench.plan import Plan
from bench.stack import Stack, running_stack
from bench.terminal import say
from bench.trips import Trip, send_batch, warm_up
from vllm_batch_dagster.settings import PROJECT_ROOT

MODEL = "smollm2-135m-instruct"
QUESTIONS = PROJECT_ROOT / "examples" / "questions.jsonl"
FACTOR, SECONDS = 1.2, 20.0

# Where each part begins; a part ends where the next one begins.
PARTS = (
    "upload and create",
    "wait for the sensor (validate)",
    "start of the validate run",
    "validation",
    "wait for the sensor (infer)",
    "start of the infer run",
    "infer run up to the first line sent",
    "inference: first line sent to last answer",
    "end of the infer run",
    "wait for the sensor (finalize)",
    "start of the finalize run",
    "merge, until the client sees `completed`",
)


def measure_latency(plan: Plan) -> Sequence[Result]:
    with running_stack(plan.folder / "latency") as stack:
        say("latency: warming the engine")
        warm_up(stack, MODEL)
        rows = [_repeat(stack, number, plan.runs) for number in range(plan.runs)]
        window = 2 * stack.engine().max_num_seqs
    lines = len(read_bodies(QUESTIONS))
    return [_result(rows, {"model": MODEL, "file": QUESTIONS.name, "lines": lines, "window": window})]


def _repeat(stack: Stack, number: int, runs: int) -> dict[str, Any]:
    """Every second repetition asks the engine directly first."""
    row: dict[str, Any] = {}
    for step in (_direct, _batch) if number % 2 else (_batch, _direct):
        say(f"latency {number + 1}/{runs}: {'the engine alone' if step is _direct else 'the batch'}")
        row |= step(stack, QUESTIONS)
    row["beyond"] = row["total"] - FACTOR * row["pure"]
    say(f"  submit to completed {row['total']:.1f} s, pure inference {row['pure']:.1f} s")
    return row


def _direct(stack: Stack, path: Path) -> dict[str, Any]:
    engine = stack.engine()
    return {"pure": infer_directly(engine.url, read_bodies(path), 2 * engine.max_num_seqs)}


def _batch(stack: Stack, path: Path) -> dict[str, Any]:
    trip = send_batch(stack, path)
    runs = runs_by_job(stack.dagster_url, trip.batch_id)
    parts = split_parts(trip, runs, stack.inference_span(trip.batch_id))
    return {**parts, "total": trip.completed - trip.submitted}


def split_parts(trip: Trip, runs: Mapping[str, Run], span: tuple[float, float]) -> dict[str, float]:
    """Return the seconds of each part; `span` is first line sent and last answer. Their sum is submit to completed."""
    validate, infer, finalize = (runs[job] for job in ("validate_batch", "infer_chunks", "finalize_batch"))
    marks = (
        *(trip.submitted, trip.accepted, validate.created, validate.started, validate.ended),
        *(infer.created, infer.started),
        *span,
        *(infer.ended, finalize.created, finalize.started, trip.completed),
    )
    return dict(zip(PARTS, (end - begin for begin, end in pairwise(marks)), strict=True))


def _result(rows: Sequence[Mapping[str, Any]], setup: Mapping[str, Any]) -> Result:
    parts: list[Figure] = [collect(part, "s", rows, part) for part in PARTS]
    return Result(
        name="latency",
        title=f"{setup['lines']} lines of {setup['file']} on a warm {MODEL}: the parts of submit to completed",
        figures=(
            collect(f"submit to completed, beyond {FACTOR} x pure inference", "s", rows, "beyond", Target(SECONDS)),
            collect("submit to completed", "s", rows, "total"),
            collect("pure inference: the same lines sent to the engine directly", "s", rows, "pure"),
            *parts,
        ),
        setup=setup,
        raw=rows,
        notes=(
            "The direct client keeps the same number of requests in flight. Run times are those of Dagster's run "
            "records; first line sent and last answer are those of the batch store.",
            "Every part is a median of its own: their sum need not be the median of the whole.",
        ),
    )
