"""`import`: CPU time to load the code location in a fresh process, and that no engine library comes with it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bench.errors import BenchFailed
from bench.figures import Result, Target, collect
from bench.plan import Plan
from bench.terminal import say

SECONDS, NONE = Target(3.0), Target(0)

_PROGRAM = """
import json, resource, sys
from vllm_batch_dagster.definitions import defs
defs()
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "cpu": used.ru_utime + used.ru_stime,
    "peak": used.ru_maxrss / 1024,
    "modules": len(sys.modules),
    "engine_libraries": sorted({"vllm", "torch", "transformers"} & set(sys.modules)),
}))
"""


def measure_import(plan: Plan) -> Sequence[Result]:
    """The first process only fills the page cache and the bytecode cache."""
    _load(plan)
    say(f"import: {plan.runs} fresh processes")
    rows = [_load(plan) for _ in range(plan.runs)]
    return [
        Result(
            name="import",
            title="loading the code location in a fresh process",
            figures=(
                collect("CPU, user + system, interpreter included", "s", rows, "cpu", SECONDS),
                collect("engine libraries loaded (vllm, torch, transformers)", "", rows, "engine_library_count", NONE),
                collect("peak memory", "MB", rows, "peak"),
            ),
            setup={"module": "vllm_batch_dagster.definitions"},
            raw=rows,
            notes=("Bytecode is compiled before; one process before the first one that counts.",),
        )
    ]


def _load(plan: Plan) -> dict[str, Any]:
    answer = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=plan.folder, capture_output=True, text=True, timeout=120, check=False
    )
    if answer.returncode != 0:
        raise BenchFailed(f"the code location does not load:\n{answer.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return row | {"engine_library_count": len(row["engine_libraries"])}
