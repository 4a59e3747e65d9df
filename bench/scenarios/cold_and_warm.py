"""`cold` and `warm`: a chat file through the product, engine off and engine warm, against run_batch on the same file.

One repetition is run_batch, cold, warm; every second one has run_batch last. The engine is stopped before run_batch,
and the idle stack is held still while it runs: it has the machine alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.baseline import check_same_engine, engine_arguments, plan_baseline, run_baseline, show_arguments
from bench.dataset import write_chat_file
from bench.figures import Figure, Result, Target, collect
from bench.page_cache import read_ahead
from bench.plan import Plan
from bench.stack import Stack, running_stack
from bench.terminal import say
from bench.trips import Trip, send_batch
from vllm_batch_dagster.adapters.engine.launch import Launch

MODEL = "smollm2-135m-instruct"
MAX_TOKENS = 32
COLD, WARM = Target(1.10), Target(0.85)


def measure_cold_and_warm(plan: Plan) -> Sequence[Result]:
    path = write_chat_file(plan.folder / "cold.jsonl", plan.sizes.cold, MODEL, MAX_TOKENS)
    with running_stack(plan.folder / "cold") as stack:
        launch = plan_baseline(stack.settings, MODEL)
        read_ahead(launch)
        rows = [_repeat(stack, launch, path, number, plan.runs) for number in range(plan.runs)]
    setup = {
        "model": MODEL,
        "lines": plan.sizes.cold,
        "max_tokens": MAX_TOKENS,
        "engine_arguments": show_arguments(engine_arguments(launch.argv)),
        "engine_environment": dict(launch.env),
        "window": launch.window,
    }
    return [
        _result("cold", "engine start included", rows, setup, COLD),
        _result("warm", "the engine runs already", rows, setup, WARM),
    ]


def _repeat(stack: Stack, launch: Launch, path: Path, number: int, runs: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for step in (_baseline, _ours) if number % 2 == 0 else (_ours, _baseline):
        stack.stop_engine()
        say(f"cold {number + 1}/{runs}: {'run-batch' if step is _baseline else 'ours, engine off, then warm'}")
        row |= step(stack, launch, path)
    say("  " + ", ".join(f"{name} {value:.1f}" for name, value in row.items()))
    return row | {name: row[f"{name}_s"] / row["run_batch_s"] for name in ("cold", "warm")}


def _baseline(stack: Stack, launch: Launch, path: Path) -> dict[str, Any]:
    with stack.paused():
        found = run_baseline(launch, path, stack.folder / "run-batch.log")
    return {
        "run_batch_s": found.wall,
        "run_batch_answers_s": found.until_answers,
        "run_batch_inference_s": found.inference,
    }


def _ours(stack: Stack, launch: Launch, path: Path) -> dict[str, Any]:
    cold = send_batch(stack, path)
    check_same_engine(launch, stack.engine().command)
    warm = send_batch(stack, path)
    return {
        "cold_s": cold.seconds,
        "warm_s": warm.seconds,
        "cold_inference_s": _inference(stack, cold),
        "warm_inference_s": _inference(stack, warm),
    }


def _inference(stack: Stack, trip: Trip) -> float:
    first, last = stack.inference_span(trip.batch_id)
    return last - first


def _result(
    name: str, state: str, rows: Sequence[Mapping[str, Any]], setup: Mapping[str, Any], target: Target
) -> Result:
    return Result(
        name=name,
        title=f"{setup['lines']} chat lines on {MODEL}, {state}, against vLLM's own run_batch",
        figures=(
            collect("ours / run_batch, wall", "x", rows, name, target),
            collect("ours: submit to output readable", "s", rows, f"{name}_s"),
            collect("ours: first line sent to last answer", "s", rows, f"{name}_inference_s"),
            *(_baseline_figures(rows) if name == "cold" else ()),
        ),
        setup=setup,
        raw=rows,
        notes=(
            f"Same file, model, engine arguments and environment; each line asks for exactly {MAX_TOKENS} tokens.",
            "A ratio is taken within a repetition; the stack is held still (SIGSTOP) while run_batch runs.",
            "`cold` and `warm` share their run_batch runs.",
        ),
    )


def _baseline_figures(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    return [
        collect("run_batch: whole process", "s", rows, "run_batch_s"),
        collect("run_batch: start to writing the answers", "s", rows, "run_batch_answers_s"),
        collect("run_batch: its inference part", "s", rows, "run_batch_inference_s"),
    ]
