"""`overhead`: requests per second on an engine so fast that our own work shows, against run_batch. Has no target."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.baseline import check_same_engine, engine_arguments, plan_baseline, run_baseline, show_arguments
from bench.dataset import write_chat_file
from bench.figures import Result, collect
from bench.page_cache import read_ahead
from bench.plan import Plan
from bench.stack import Stack, running_stack
from bench.terminal import say
from bench.trips import send_batch, warm_up
from vllm_batch_dagster.adapters.engine.config import resolve_device
from vllm_batch_dagster.adapters.engine.launch import Launch

MODEL = "tiny-random"
MAX_TOKENS = 8


def measure_overhead(plan: Plan) -> Sequence[Result]:
    lines = plan.sizes.overhead
    path = write_chat_file(plan.folder / "overhead.jsonl", lines, MODEL, MAX_TOKENS)
    with running_stack(plan.folder / "overhead") as stack:
        launch = plan_baseline(stack.settings, MODEL)
        read_ahead(launch)
        say("overhead: warming the engine")
        warm_up(stack, MODEL)
        check_same_engine(launch, stack.engine().command)
        rows = [_repeat(stack, launch, path, number, plan.runs) for number in range(plan.runs)]
    setup = {
        "model": MODEL,
        "lines": lines,
        "max_tokens": MAX_TOKENS,
        "engine_arguments": show_arguments(engine_arguments(launch.argv)),
        "engine_environment": dict(launch.env),
        "window": launch.window,
    }
    return [_result(rows, setup)]


def _repeat(stack: Stack, launch: Launch, path: Path, number: int, runs: int) -> dict[str, Any]:
    """Every second repetition has run_batch last."""
    row: dict[str, Any] = {}
    for step in (_baseline, _ours) if number % 2 == 0 else (_ours, _baseline):
        say(f"overhead {number + 1}/{runs}: {'run-batch' if step is _baseline else 'ours'}")
        row |= step(stack, launch, path)
    lines = path.read_bytes().count(b"\n")
    rates = {f"{key.removesuffix('_s')}_rate": lines / value for key, value in row.items()}
    say("  " + ", ".join(f"{name} {value:.0f}/s" for name, value in rates.items()))
    ratios = {
        "inference_ratio": rates["ours_inference_rate"] / rates["run_batch_inference_rate"],
        "wall_ratio": rates["ours_rate"] / rates["run_batch_rate"],
    }
    return row | rates | ratios


def _baseline(stack: Stack, launch: Launch, path: Path) -> dict[str, float]:
    _make_room(stack)
    with stack.paused():
        found = run_baseline(launch, path, stack.folder / "run-batch.log")
    return {"run_batch_s": found.wall, "run_batch_inference_s": found.inference}


def _ours(stack: Stack, _launch: Launch, path: Path) -> dict[str, float]:
    if not stack.has_engine:
        warm_up(stack, MODEL)
    trip = send_batch(stack, path)
    first, last = stack.inference_span(trip.batch_id)
    return {"ours_s": trip.completed - trip.submitted, "ours_inference_s": last - first}


def _make_room(stack: Stack) -> None:
    """A GPU has no memory for two engines; the idle one on a processor is in nobody's way."""
    if resolve_device(stack.settings.engine_device) == "cuda":
        stack.stop_engine()


def _result(rows: Sequence[Mapping[str, Any]], setup: Mapping[str, Any]) -> Result:
    return Result(
        name="overhead",
        title=f"{setup['lines']} lines on {MODEL}, engine warm, against vLLM's own run_batch",
        figures=(
            collect("ours / run_batch, req/s of inference", "x", rows, "inference_ratio"),
            collect("ours / run_batch, req/s of the whole", "x", rows, "wall_ratio"),
            collect("ours: first line sent to last answer", "req/s", rows, "ours_inference_rate"),
            collect("run_batch: its inference part", "req/s", rows, "run_batch_inference_rate"),
            collect("ours: submit to completed", "req/s", rows, "ours_rate"),
            collect("run_batch: whole process, engine start included", "req/s", rows, "run_batch_rate"),
        ),
        setup=setup,
        raw=rows,
        notes=(
            "No target: it shows what HTTP, the journal and the graph cost where the model costs next to nothing. "
            "A ratio above 1 means that ours is faster.",
            "run_batch's inference part is from reading the file to writing the answers, by its own log lines.",
        ),
    )
