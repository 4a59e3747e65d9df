"""`validation`: how fast one core checks an input file, and how much memory that takes. No engine, no Dagster."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.dataset import write_padded_file
from bench.errors import BenchFailed
from bench.figures import Figure, Result, Target, collect
from bench.plan import Plan
from bench.terminal import say
from bench.validating import MODEL

MEGABYTE = 1_000_000
LINE_BYTES = 4000
LONG_FILE_LINE_BYTES = 300
RATE = Target(100.0, at_least=True)
SECONDS = Target(60.0)
GROWTH = Target(50.0)
_PROJECT = Path(__file__).resolve().parents[2]


def measure_validation(plan: Plan) -> Sequence[Result]:
    """Each repetition is a process of its own; beside it, the same file through `json.loads` a line at a time."""
    lines, many = plan.sizes.validation, plan.sizes.validation_long
    wide = write_padded_file(plan.folder / "wide.jsonl", lines, MODEL, LINE_BYTES)
    small = write_padded_file(plan.folder / "small.jsonl", max(1, lines // 10), MODEL, LINE_BYTES)
    rows = []
    for number in range(plan.runs):
        row = _validate(plan, wide, number)
        rows.append({**row, "mbps": row["bytes"] / MEGABYTE / row["seconds"], "plain": _plain_rate(wide)})
        say(f"validation: {lines} lines, {row['bytes'] / MEGABYTE:.0f} MB: {rows[-1]['mbps']:.0f} MB/s")
    least = _validate(plan, small, plan.runs)
    long_file = write_padded_file(plan.folder / "long.jsonl", many, MODEL, LONG_FILE_LINE_BYTES)
    most = _validate(plan, long_file, plan.runs + 1)
    say(f"validation: {many} lines: {most['seconds']:.1f} s, peak {most['peak']:.0f} MB")
    for path in (wide, small, long_file):
        path.unlink()
    return [_result(rows, least, most)]


def _validate(plan: Plan, path: Path, number: int) -> dict[str, Any]:
    folder = plan.folder / f"validation-{number}"
    folder.mkdir()
    command = [sys.executable, "-m", "bench.validating", str(path), str(folder)]
    done = subprocess.run(command, cwd=_PROJECT, capture_output=True, text=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        raise BenchFailed(f"the validation failed:\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if row["errors"]:
        raise BenchFailed(f"{path.name} has {row['errors']} errors where none was expected")
    return row


def _plain_rate(path: Path) -> float:
    """MB/s of what a program does at least that reads the lines one by one."""
    began = time.perf_counter()
    with path.open("rb") as file:
        for line in file:
            json.loads(line)
    return path.stat().st_size / MEGABYTE / (time.perf_counter() - began)


def _result(rows: Sequence[dict[str, Any]], least: dict[str, Any], most: dict[str, Any]) -> Result:
    size = f"{rows[0]['bytes'] / MEGABYTE:.0f} MB, {rows[0]['lines']} lines"
    spans = ((least, rows[0]), (rows[0], most))
    return Result(
        name="validation",
        title="every line of a file checked and indexed, on one core",
        figures=(
            collect(f"{size}: rate", "MB/s", rows, "mbps", RATE),
            collect(f"{size}: json.loads alone", "MB/s", rows, "plain"),
            collect(f"{most['lines']} lines, {most['bytes'] / MEGABYTE:.0f} MB", "s", [most], "seconds", SECONDS),
            *(
                Figure(
                    f"growth of the peak from {one['lines']} to {other['lines']} lines",
                    "MB",
                    (other["peak"] - one["peak"],),
                    GROWTH,
                )
                for one, other in spans
            ),
            collect(f"peak at {most['lines']} lines", "MB", [most], "peak"),
        ),
        setup={"line_bytes": LINE_BYTES, "long_file_line_bytes": LONG_FILE_LINE_BYTES, "cores": 1},
        raw=(*rows, least, most),
        notes=(
            "The process is bound to one core and runs what the asset `validated_input` runs: the pass over the file, "
            "the byte index with its fsync, the search for repeated ids, the plan of the chunks in SQLite.",
            "Peers: none publishes a rate. vLLM's run_batch parses the whole file into memory before the first request "
            "(vllm#30268: 177 GB for 500,000 lines) and ends at the first bad line.",
        ),
    )
