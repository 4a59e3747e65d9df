"""`orchestration`: what Dagster costs per run and per further chunk, and whether the engine drains at a chunk border.

The same lines go through as one chunk and as eight (CHUNK_SIZE), on a tiny model, so that little but orchestration
is left. One more batch of eight chunks is watched through the engine's own gauges.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.dagster_runs import runs_by_job
from bench.dataset import write_chat_file
from bench.figures import Figure, Result, Target, collect
from bench.plan import Plan
from bench.stack import Stack, running_stack
from bench.terminal import say
from bench.trips import Trip, send_batch, warm_up
from bench.watching import Watch, describe_watches, find_worst, watch_batch

MODEL = "tiny-random"
MAX_TOKENS = 8
WATCHED_TOKENS = 24  # longer than the others, so that the gauges are read often between two borders
CHUNKS = 8
PER_RUN, PER_CHUNK = Target(6.0), Target(0.5)
JOBS = {"validate_batch": "validate", "infer_chunks": "infer", "finalize_batch": "finalize"}


def measure_orchestration(plan: Plan) -> Sequence[Result]:
    lines = plan.sizes.chunks
    path = write_chat_file(plan.folder / "chunks.jsonl", lines, MODEL, MAX_TOKENS)
    one, undivided = _measure_chunks(plan, path, 1)
    many, watches = _measure_chunks(plan, path, CHUNKS)
    plan.results.mkdir(parents=True, exist_ok=True)
    title = f"vLLM's gauges over {CHUNKS} chunks of one run ({MODEL})"
    (plan.results / "gauges.svg").write_text(find_worst(watches).draw(title))
    setup = {
        "model": MODEL,
        "lines": lines,
        "max_tokens": MAX_TOKENS,
        "watched_max_tokens": WATCHED_TOKENS,
        "chunk_counts": [1, CHUNKS],
    }
    return [_result(one, many, watches, undivided[0], setup)]


def _measure_chunks(plan: Plan, path: Path, chunks: int) -> tuple[list[dict[str, Any]], list[Watch]]:
    """Return the repetitions with `chunks` chunks, and watched batches: as many, or one where there is no border."""
    size = -(-plan.sizes.chunks // chunks)
    watched = write_chat_file(plan.folder / "watched.jsonl", plan.sizes.chunks, MODEL, WATCHED_TOKENS)
    watches = []
    with running_stack(plan.folder / f"chunks-{chunks}", CHUNK_SIZE=str(size)) as stack:
        say("orchestration: warming the engine")
        warm_up(stack, MODEL)
        rows = [_repeat(stack, path, chunks, number, plan.runs) for number in range(plan.runs)]
        for number in range(count := plan.runs if chunks > 1 else 1):
            say(f"orchestration {number + 1}/{count}: the engine's gauges, {chunks} chunk{'s' if chunks > 1 else ''}")
            watches.append(watch_batch(stack, watched))
    return rows, watches


def _repeat(stack: Stack, path: Path, chunks: int, number: int, runs: int) -> dict[str, Any]:
    say(f"orchestration {number + 1}/{runs}: {chunks} chunk{'s' if chunks > 1 else ''}")
    return {"chunks": chunks, **read_costs(stack, send_batch(stack, path))}


def read_costs(stack: Stack, trip: Trip) -> dict[str, Any]:
    """Return walls and inference span of a finished batch, and what each run cost beside inference."""
    runs = runs_by_job(stack.dagster_url, trip.batch_id)
    first, last = stack.inference_span(trip.batch_id)
    walls = {f"{name}_wall": runs[job].wall for job, name in JOBS.items()}
    infer = runs["infer_chunks"]
    return {
        **walls,
        "inference": last - first,
        "infer_cost": infer.wall - (last - first),
        "before_first": first - infer.created,
        "after_last": infer.ended - last,
        "total": trip.completed - trip.submitted,
        "chunk_count": len(stack.chunk_summaries(trip.batch_id)),
    }


def _result(
    one: Sequence[Mapping[str, Any]],
    many: Sequence[Mapping[str, Any]],
    watches: Sequence[Watch],
    undivided: Watch,
    setup: Mapping[str, Any],
) -> Result:
    worst = find_worst(watches)
    return Result(
        name="orchestration",
        title=f"cost per run and per chunk: {setup['lines']} lines on {MODEL} as 1 and as {CHUNKS} chunks",
        figures=(*_costs(one, many), *describe_watches(watches, undivided)),
        setup=setup,
        raw=[*one, *many, *({"gauges": watch.as_data()} for watch in (*watches, undivided))],
        notes=(
            "A run's wall is from the sensor's request to the run's end. Validation and merge count wholly as cost.",
            f"A further chunk costs (wall with {CHUNKS} chunks - wall with 1) / {CHUNKS - 1}, repetition by "
            "repetition; the two are measured one after the other, each on a stack of its own.",
            f"Below is the watched batch with the least reading. It was read {worst.drain.samples} times between the "
            f"first and the last moment in which the engine had a request; {worst.drain.zeros} of them said 0. "
            f"{len(worst.at_borders)} of {len(worst.borders)} chunk borders fall into that time; the others are in the "
            "first window of requests.",
            "![The engine's gauges over the run, chunk borders marked](gauges.svg)",
        ),
    )


def _costs(one: Sequence[Mapping[str, Any]], many: Sequence[Mapping[str, Any]]) -> list[Figure]:
    return [
        collect("infer run, 1 chunk: wall minus inference", "s", one, "infer_cost", PER_RUN),
        collect("validate run: wall", "s", one, "validate_wall", PER_RUN),
        collect("finalize run: wall", "s", one, "finalize_wall", PER_RUN),
        per_chunk("infer_wall", "each further chunk: infer run's wall", one, many, PER_CHUNK),
        per_chunk("infer_cost", "each further chunk: infer run's wall minus inference", one, many),
        collect("infer run, 1 chunk: asked for to first line sent", "s", one, "before_first"),
        collect("infer run, 1 chunk: last answer to end", "s", one, "after_last"),
        collect("inference, 1 chunk", "s", one, "inference"),
        collect(f"inference, {CHUNKS} chunks", "s", many, "inference"),
        collect(f"infer run, {CHUNKS} chunks: wall minus inference", "s", many, "infer_cost"),
    ]


def per_chunk(
    key: str,
    name: str,
    one: Sequence[Mapping[str, Any]],
    many: Sequence[Mapping[str, Any]],
    target: Target | None = None,
) -> Figure:
    """Return what each chunk after the first adds to `key`, repetition by repetition."""
    further = tuple((b[key] - a[key]) / (b["chunk_count"] - a["chunk_count"]) for a, b in zip(one, many, strict=True))
    return Figure(name, "s", further, target)
