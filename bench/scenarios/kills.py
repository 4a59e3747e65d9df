"""`kills`: a hundred SIGKILLs at random instants of one batch: what is lost, doubled, sent again, and what they take.

On the simulated engine in three processes (tests/faults/engine_group.py), whose witness log has every line that it was
asked. `kills-real` does the same on vLLM with fewer kills; there nobody counts what was sent again. Neither is part of
a plain `make bench`.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.dataset import write_chat_file
from bench.errors import BenchFailed
from bench.figures import Figure, Result, Target
from bench.killing import VICTIMS, Kill, count_redone, most_per_kill
from bench.plan import Plan
from bench.stack import Stack, running_stack
from bench.terminal import say
from tests.faults.engine_group import write_engine_python

SIMULATED, REAL = "simulated", "smollm2-135m-instruct"
SEED = 20261126
SEQS, REAL_SEQS = 64, 16
LATENCY = 0.2
BETWEEN_SECONDS = (0.2, 2.0)
WAIT_SECONDS = 600
END_SECONDS = 3600
# A run that dies costs its detection and its start, so most kills are of the engine.
MIX = {"run": 3, "engine API": 3, "engine core": 3, "engine worker": 1}
RUN_SECONDS = Target(20.0)


def measure_kills(plan: Plan) -> Sequence[Result]:
    folder = plan.folder / "kills"
    folder.mkdir(parents=True)
    witness = folder / "witness"
    models = folder / "models.yaml"
    models.write_text(f"models:\n  - name: {SIMULATED}\n    path: someone/{SIMULATED}\n")
    settings = {
        "ENGINE_PYTHON": str(write_engine_python(folder, witness, LATENCY)),
        "ENGINE_DEVICE": "cpu",
        "MODELS_FILE": str(models),
        "MAX_NUM_SEQS": str(SEQS),
    }
    lines, kills = plan.sizes.kills
    path = write_chat_file(folder / "kills.jsonl", lines, SIMULATED, 8)
    with running_stack(folder / "stack", **settings) as stack:
        row = _measure(stack, path, kills, lambda _batch_id: _count_lines(witness))
    asked = witness.read_text().split()
    row["redone"] = count_redone(asked, [kill["asked"] for kill in row["kills"]])
    return [_result("kills", f"{kills} SIGKILLs in {lines} lines on the simulated engine", row, 2 * SEQS)]


def measure_kills_real(plan: Plan) -> Sequence[Result]:
    lines, kills = plan.sizes.kills_real
    path = write_chat_file(plan.folder / "kills-real.jsonl", lines, REAL, 32)
    settings = {"MAX_NUM_SEQS": str(REAL_SEQS), "CHUNK_SIZE": "100"}
    with running_stack(plan.folder / "kills-real", **settings) as stack:
        row = _measure(stack, path, kills, lambda batch_id: _answered(stack, batch_id))
    return [_result("kills-real", f"{kills} SIGKILLs in {lines} lines on {REAL}", row, 2 * REAL_SEQS)]


def _count_lines(witness: Path) -> int:
    return witness.read_bytes().count(b"\n") if witness.exists() else 0


def _answered(stack: Stack, batch_id: str) -> int:
    counts = stack.client.batches.retrieve(batch_id).request_counts
    return counts.completed + counts.failed if counts else 0


def _measure(stack: Stack, path: Path, kills: int, progress: Callable[[str], int]) -> dict[str, Any]:
    """Send the file and kill while it runs. `progress` grows with each line that reaches the engine (real: each answer
    that is on the disk)."""
    began = time.time()
    with path.open("rb") as file:
        uploaded = stack.client.files.create(file=file, purpose="batch")
    batch_id = stack.client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
    ).id
    dice = random.Random(SEED)
    done: list[Kill] = []
    _wait_more(stack, batch_id, progress, 0)
    while len(done) < kills and not _has_ended(stack, batch_id):
        time.sleep(dice.uniform(*BETWEEN_SECONDS))
        (what,) = dice.choices(list(MIX), list(MIX.values()))
        if (kill := _kill(stack, batch_id, what, progress)) is not None:
            done.append(kill)
            say(f"  kill {len(done)} of {kills}: {kill.what}; on after {kill.recovered:.1f} s, {kill.asked} so far")
    _wait_end(stack, batch_id)
    return {
        "seconds": time.time() - began,
        "wanted": kills,
        "kills": [{"what": each.what, "asked": each.asked, "recovered": each.recovered} for each in done],
        **_check(stack, batch_id, path),
    }


def _kill(stack: Stack, batch_id: str, what: str, progress: Callable[[str], int]) -> Kill | None:
    """Kill it and wait until lines go on; None when it does not exist just now, or the batch is past its lines."""
    pid = VICTIMS[what](stack)
    if pid is None or _has_ended(stack, batch_id):
        return None
    os.kill(pid, signal.SIGKILL)
    at, asked = time.time(), progress(batch_id)
    if not _wait_more(stack, batch_id, progress, asked):
        return None
    return Kill(what, at, asked, time.time() - at)


def _wait_more(stack: Stack, batch_id: str, progress: Callable[[str], int], than: int) -> bool:
    """Wait until more lines have come than that; False when the batch has ended first."""
    end = time.monotonic() + WAIT_SECONDS
    while progress(batch_id) <= than:
        if _has_ended(stack, batch_id):
            return False
        if time.monotonic() > end:
            raise BenchFailed(f"{batch_id} did not go on within {WAIT_SECONDS} s after a kill")
        time.sleep(0.1)
    return True


def _has_ended(stack: Stack, batch_id: str) -> bool:
    return stack.client.batches.retrieve(batch_id).status in {"completed", "failed", "expired", "cancelled"}


def _wait_end(stack: Stack, batch_id: str) -> None:
    end = time.monotonic() + END_SECONDS
    while not _has_ended(stack, batch_id):
        if time.monotonic() > end:
            raise BenchFailed(f"{batch_id} did not end within {END_SECONDS} s")
        time.sleep(0.5)


def _check(stack: Stack, batch_id: str, path: Path) -> dict[str, Any]:
    """Compare the ids of both files with those of the input."""
    batch = stack.client.batches.retrieve(batch_id)
    wanted = [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]
    texts = {
        file_id: stack.client.files.content(file_id).text
        for file_id in (batch.output_file_id, batch.error_file_id)
        if file_id
    }
    answered = Counter(json.loads(line)["custom_id"] for text in texts.values() for line in text.splitlines())
    return {
        "status": batch.status,
        "lost": sum(not answered[name] for name in wanted),
        "doubled": sum(times > 1 for times in answered.values()),
        "errors": batch.request_counts.failed if batch.request_counts else len(wanted),
    }


def _result(name: str, title: str, row: Mapping[str, Any], window: int) -> Result:
    kills = row["kills"]
    figures = [
        Figure(
            "kills that met the batch at work", "", (float(len(kills)),), Target(float(row["wanted"]), at_least=True)
        ),
        Figure("lines lost", "", (float(row["lost"]),), Target(0.0)),
        Figure("lines doubled", "", (float(row["doubled"]),), Target(0.0)),
        Figure("lines with an error", "", (float(row["errors"]),), Target(0.0)),
    ]
    if redone := row.get("redone"):
        figures += [
            Figure("lines sent again per kill: mean", "", (sum(redone) / len(redone),)),
            Figure("lines sent again per kill: most, of two in a row", "", (most_per_kill(redone),), Target(window)),
        ]
    for what in MIX:
        seconds = tuple(kill["recovered"] for kill in kills if kill["what"] == what)
        if seconds:
            figures.append(
                Figure(f"kill of the {what} until the next line", "s", seconds, RUN_SECONDS if what == "run" else None)
            )
    return Result(
        name=name,
        title=title,
        figures=figures,
        setup={"seed": SEED, "window": window, "mix": MIX},
        raw=[row],
        notes=(
            "A kill comes at a random instant while lines are sent, and the next one after lines have gone on.",
            "Sent again are the lines in flight and those whose answer waited for its fsync: at most the window.",
            "A kill that comes before the lines of the last one were sent again pays for both: the most is that of two "
            "kills in a row, halved.",
        ),
    )
