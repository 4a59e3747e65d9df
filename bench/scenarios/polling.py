"""`polling`: how long a poller waits for an answer while a batch runs and the store is full of old batches."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.dataset import write_chat_file, write_models
from bench.errors import BenchFailed
from bench.figures import Figure, Result, Target, collect
from bench.plan import Plan
from bench.polling import PERIOD_SECONDS, percentile, poll
from bench.seeding import seed_batches
from bench.stack import Stack, running_stack
from bench.terminal import say
from vllm_batch_dagster.adapters.simulated.process import SimulatedProcess

MODEL = "simulated"
POLLERS = 50
WAIT = Target(25.0)
LATENCY_SECONDS = 0.5
SEQUENCES = 128
ENGINE_RATE = SEQUENCES / LATENCY_SECONDS  # requests per second at most
_SPARE_SECONDS = 60
_BEGIN_SECONDS = 120
_PATHS = {"GET /v1/batches/{id}": "/v1/batches/{batch}", "GET /v1/batches": "/v1/batches"}


def measure_polling(plan: Plan) -> Sequence[Result]:
    """Both routes in turns, `runs` times, within one long batch."""
    seconds = plan.sizes.polling
    lines = int(ENGINE_RATE * (2 * seconds * plan.runs + _SPARE_SECONDS))
    models = write_models(plan.folder / "polling-models.yaml", MODEL)
    engine = SimulatedProcess("--model", MODEL, "--latency", str(LATENCY_SECONDS), "--max-num-seqs", str(SEQUENCES))
    stack = Stack(plan.folder / "polling", {"MODELS_FILE": str(models), "ENGINE_URL": engine.url})
    say(f"polling: writing {plan.sizes.stored} batches into the store")
    seed_batches(stack.settings, plan.sizes.stored)
    path = write_chat_file(plan.folder / "polling.jsonl", lines, MODEL, 8)
    with engine, running_stack(stack):
        batch_id = _begin_batch(stack, path.read_bytes())
        rows = [_ask(stack, batch_id, route, seconds) for _ in range(plan.runs) for route in _PATHS]
        answered = _answered(stack, batch_id)
    return [_result(rows, plan, lines, answered)]


def _begin_batch(stack: Stack, contents: bytes) -> str:
    """Return the id of a batch that has its first answers. Raises BenchFailed."""
    file = stack.client.files.create(file=("input.jsonl", contents), purpose="batch")
    batch = stack.client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    deadline = time.monotonic() + _BEGIN_SECONDS
    while not _answered(stack, batch.id):
        if time.monotonic() > deadline:
            raise BenchFailed(f"{batch.id} has no answer after {_BEGIN_SECONDS} s")
        time.sleep(0.5)
    return batch.id


def _answered(stack: Stack, batch_id: str) -> int:
    """Return how many lines have an answer. Raises BenchFailed when the batch does not run any more."""
    batch = stack.client.batches.retrieve(batch_id)
    if batch.status not in ("validating", "in_progress"):
        raise BenchFailed(f"{batch_id} is {batch.status}: the pollers must meet a running batch")
    return batch.request_counts.completed if batch.request_counts else 0


def _ask(stack: Stack, batch_id: str, route: str, seconds: float) -> dict[str, Any]:
    """One repetition of one route. Raises BenchFailed when the batch is not at work meanwhile."""
    before = _answered(stack, batch_id)
    took = poll(stack.api_url + _PATHS[route].format(batch=batch_id), POLLERS, seconds)
    after = _answered(stack, batch_id)
    if after <= before:
        raise BenchFailed(f"{batch_id} stood still while it was polled")
    milliseconds = {name: 1000 * percentile(took, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1))}
    say(f"polling: {route}: p50 {milliseconds['p50']:.1f}, p99 {milliseconds['p99']:.1f} ms of {len(took)} requests")
    rates = {"per_second": len(took) / (seconds - PERIOD_SECONDS), "batch_per_second": (after - before) / seconds}
    return {"route": route, "requests": len(took), **milliseconds, **rates}


def _result(rows: Sequence[Mapping[str, Any]], plan: Plan, lines: int, answered: int) -> Result:
    figures: list[Figure] = []
    for route in _PATHS:
        of_route = [row for row in rows if row["route"] == route]
        for name in ("p50", "p99", "max"):
            target = WAIT if name == "p99" else None
            figures.append(collect(f"{route}: {name}", "ms", of_route, name, target))
    figures.append(collect("requests of the pollers", "per s", rows, "per_second"))
    figures.append(collect("lines of the batch meanwhile", "per s", rows, "batch_per_second"))
    return Result(
        name="polling",
        title=f"{POLLERS} pollers, a running batch, {plan.sizes.stored} stored batches, **simulated engine**",
        figures=figures,
        setup={
            "pollers": POLLERS,
            "period_s": PERIOD_SECONDS,
            "seconds": plan.sizes.polling,
            "stored": plan.sizes.stored,
            "lines": lines,
            "engine": f"simulated, {LATENCY_SECONDS} s a request, {SEQUENCES} at once",
        },
        raw=[*rows, {"answered": answered}],
        notes=(
            f"A poller has one kept connection and asks every {PERIOD_SECONDS:g} s, after its last answer; the pollers "
            "are spread over the second. From the request to the last byte of the answer, over loopback. The client, "
            "the whole stack and the engine share the cores.",
            "Polled is the running batch, and the first page (20 batches) of the list.",
            "Peers: none publishes how long its API takes to answer. llm-d #491 reports a p99 of 82 to 1,832 ms for "
            "the first token of interactive requests beside a batch, which is a different thing.",
        ),
    )
