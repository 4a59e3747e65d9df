"""`recovery`: how long a death costs. Real vLLM whose core is killed, a simulated engine, and the worker of a run.

Each kill comes in the middle of a batch that is cancelled after the measurement.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai

from bench.dataset import read_bodies, write_chat_file
from bench.errors import BenchFailed
from bench.figures import Figure, Result, Target, collect
from bench.plan import Plan
from bench.recovery import find_core, first_after_quiet, first_growth, journal_bytes, next_engine, until
from bench.stack import Stack, running_stack
from bench.terminal import say
from bench.trips import warm_up
from vllm_batch_dagster.adapters.engine import engine_status, manage_engine, stop_engine
from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.adapters.simulated import SimulatedProcess, import_path, simulated_command
from vllm_batch_dagster.cli.processes import run_workers
from vllm_batch_dagster.core.errors import EngineUnavailable
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import EngineAnswer, EngineLease, EngineRequest

MODEL, SIMULATED = "smollm2-135m-instruct", "simulated"
MAX_TOKENS = 8  # short, so that the first new answer does not measure the engine's speed
ENGINE_TARGET, RUN_TARGET = Target(5.0), Target(20.0)
_RESTART_SECONDS, _SOON = 300.0, 120.0
_CHAT = "/v1/chat/completions"


def measure_recovery(plan: Plan) -> Sequence[Result]:
    return [*_measure_real(plan), *_measure_simulated(plan), *_measure_runs(plan)]


def _measure_real(plan: Plan) -> Iterator[Result]:
    path = write_chat_file(plan.folder / "recovery.jsonl", plan.sizes.recovery, MODEL, MAX_TOKENS)
    with running_stack(plan.folder / "recovery", MAX_NUM_SEQS="32", ENGINE_PORT="0") as stack:
        warm_up(stack, MODEL)
        rows = [_kill_core(stack, path, number, plan.runs) for number in range(plan.runs)]
    setup = {"model": MODEL, "lines": plan.sizes.recovery, "max_tokens": MAX_TOKENS, "max_num_seqs": 32}
    yield _engine_result("recovery-engine", "SIGKILL of vLLM's EngineCore in a batch", rows, setup)


def _kill_core(stack: Stack, path: Path, number: int, runs: int) -> dict[str, Any]:
    folder = stack.settings.engine_folder
    with _batch(stack, path) as batch_id:
        until(lambda: _answers(stack, batch_id) or None, _SOON, "the first answer")
        old = stack.engine()
        find_core(old.pid).kill()
        killed = time.time()
        new, ready = next_engine(folder, old, _RESTART_SECONDS)
        answered = first_growth(lambda: _answers(stack, batch_id), _SOON, "an answer of the new engine")
    return _engine_row(f"recovery {number + 1}/{runs}", killed, new.started_at, ready, answered)


def _answers(stack: Stack, batch_id: str) -> int:
    return journal_bytes(stack.settings.batches_folder, batch_id)


def _engine_row(name: str, killed: float, started: float, ready: float, answered: float) -> dict[str, Any]:
    row = {
        "total": answered - killed,
        "start": ready - started,
        "until_start": started - killed,
        "after_start": answered - ready,
        "beyond": (answered - killed) - (ready - started),
    }
    say(f"  {name}: " + ", ".join(f"{key} {value:.2f} s" for key, value in row.items()))
    return row


def _engine_result(name: str, title: str, rows: Sequence[Mapping[str, Any]], setup: Mapping[str, Any]) -> Result:
    return Result(
        name=name,
        title=f"{title}: until the first new answer",
        figures=(
            collect(
                "from the kill to the first new answer, beyond the engine's start", "s", rows, "beyond", ENGINE_TARGET
            ),
            collect("from the kill to the first new answer", "s", rows, "total"),
            collect("from the kill to the start of the next engine", "s", rows, "until_start"),
            collect("start of the engine, until it is ready", "s", rows, "start"),
            collect("from there to the first new answer", "s", rows, "after_start"),
        ),
        setup=setup,
        raw=rows,
        notes=("An answer counts when it is in the journal.", "Ready and answers are looked at 50 times a second."),
    )


def _measure_simulated(plan: Plan) -> Iterator[Result]:
    path = write_chat_file(plan.folder / "recovery-simulated.jsonl", 256, SIMULATED, MAX_TOKENS)
    bodies = read_bodies(path)
    rows = [asyncio.run(_kill_simulated(plan.folder / "engine", bodies, n, plan.runs)) for n in range(plan.runs)]
    yield _engine_result(
        "recovery-simulated", "SIGKILL of a **simulated** engine under load", rows, {"in_flight": len(bodies)}
    )


async def _kill_simulated(folder: Path, bodies: Sequence[bytes], number: int, runs: int) -> dict[str, Any]:
    os.environ["PYTHONPATH"] = import_path()
    command = simulated_command("--latency", "0.5")
    config = EngineConfig(folder=folder, python=sys.executable, device="cpu", port=0, command=command)
    try:
        async with manage_engine(config).lease(Model(SIMULATED, "nowhere"), lambda _sentence: None) as lease:
            sends = asyncio.gather(*(_send(lease, body, number) for number, body in enumerate(bodies)))
            await asyncio.sleep(0.2)
            status = engine_status(folder)
            if status is None:
                raise BenchFailed("the simulated engine is gone")
            os.kill(status.pid, signal.SIGKILL)
            killed = time.time()
            ready = await asyncio.to_thread(next_engine, folder, status, _SOON)
            answered = min(await sends)
    finally:
        stop_engine(folder)
    return _engine_row(f"simulated {number + 1}/{runs}", killed, ready[0].started_at, ready[1], answered)


async def _send(lease: EngineLease, body: bytes, number: int) -> float:
    """Send until there is an answer, as a run does; returns when it came."""
    while True:
        try:
            answer: EngineAnswer = await lease.send(EngineRequest(_CHAT, body, f"request-{number}"))
        except EngineUnavailable:
            await lease.recover()
            continue
        if answer.status != 200:
            raise BenchFailed(f"the simulated engine answered {answer.status}")
        return time.time()


def _measure_runs(plan: Plan) -> Iterator[Result]:
    models = plan.folder / "recovery-models.yaml"
    models.write_text(f"models:\n  - name: {SIMULATED}\n    path: someone/{SIMULATED}\n")
    witness = plan.folder / "recovery-witness"
    options = ("--model", SIMULATED, "--latency", "0.5", "--max-num-seqs", "32")
    with (
        SimulatedProcess(*options, witness=witness) as engine,
        running_stack(
            plan.folder / "recovery-runs", ENGINE_URL=engine.url, MODELS_FILE=str(models), MAX_NUM_SEQS="32"
        ) as stack,
    ):
        path = write_chat_file(plan.folder / "recovery-runs.jsonl", 8000, SIMULATED, MAX_TOKENS)
        rows = [_kill_worker(stack, path, witness, number, plan.runs) for number in range(plan.runs)]
    yield Result(
        name="recovery-run",
        title="SIGKILL of the worker of a chunk run, **simulated engine**: until its retry sends",
        figures=(Figure("from the kill to the retry's first request", "s", tuple(rows), RUN_TARGET),),
        setup={"engine": "simulated", "lines": 8000},
        raw=[{"dispatch": seconds} for seconds in rows],
        notes=("A request counts when it has reached the engine: the engine notes each.",),
    )


def _kill_worker(stack: Stack, path: Path, witness: Path, number: int, runs: int) -> float:
    with _batch(stack, path) as batch_id:
        until(lambda: _answers(stack, batch_id) or None, _SOON, "the first answer")
        workers = run_workers(stack.pid_of("code"))
        if not workers:
            raise BenchFailed("no run works on the batch")
        for worker in workers:
            worker.kill()
        killed = time.time()
        sent = first_after_quiet(lambda: witness.stat().st_size, _SOON, "a request of the retry")
    say(f"  run {number + 1}/{runs}: the retry sends after {sent - killed:.1f} s")
    return sent - killed


@contextmanager
def _batch(stack: Stack, path: Path) -> Iterator[str]:
    """Send a batch, and cancel it at the end."""
    with path.open("rb") as file:
        uploaded = stack.client.files.create(file=file, purpose="batch")
    batch = stack.client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    try:
        yield batch.id
    finally:
        with suppress(openai.APIStatusError):  # it has ended by itself
            stack.client.batches.cancel(batch.id)

        def ended() -> bool | None:
            return stack.client.batches.retrieve(batch.id).status in ("cancelled", "completed") or None

        until(ended, _SOON, "the end of the batch")
