"""Stands in for the Python of the engine environment: what we start with it is a simulated engine in three processes.

As vLLM does: an API server, its EngineCore, and the core's worker. A dead worker ends the core; a dead core is a 500
for everything in flight and an API server that ends with code 0; a killed API server leaves the other two behind.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vllm_batch_dagster.adapters.simulated import Faults, set_faults
from vllm_batch_dagster.adapters.simulated.__main__ import main as serve
from vllm_batch_dagster.settings import PROJECT_ROOT

CORE, WORKER = "VLLM::EngineCore", "VLLM::Worker"
LATENCY_VARIABLE = "SIMULATED_LATENCY"
_WORKER_CODE = "import time; time.sleep(100_000)"
_CORE_CODE = f"import subprocess, sys; subprocess.call([sys.executable, '-c', {_WORKER_CODE!r}, {WORKER!r}])"


def write_engine_python(folder: Path, witness: Path, latency: float) -> Path:
    """Write the program for ENGINE_PYTHON and return its path."""
    path = folder / "engine-python"
    path.write_text(
        "#!/bin/sh\n"
        f"export PYTHONPATH='{PROJECT_ROOT}' SIMULATED_WITNESS='{witness}' {LATENCY_VARIABLE}={latency}\n"
        f"exec '{sys.executable}' -m tests.faults.engine_group \"$@\"\n"
    )
    path.chmod(0o755)
    return path


def main(argv: Sequence[str]) -> None:
    if "serve" not in argv:
        sys.stdout.write("simulated\n")  # it was asked for the version of vLLM
        return
    port = _after(argv, "--port")[0]
    core = subprocess.Popen([sys.executable, "-c", _CORE_CODE, CORE])
    threading.Thread(target=_follow, args=(core, int(port)), daemon=True).start()
    try:
        options = ("--port", port, "--latency", os.environ[LATENCY_VARIABLE])
        seqs = _after(argv, "--max-num-seqs")[0]
        serve([*options, "--max-num-seqs", seqs, "--model", *_after(argv, "--served-model-name")])
    finally:
        core.kill()


def _after(argv: Sequence[str], option: str) -> list[str]:
    """Return the values of an option."""
    found: list[str] = []
    for word in argv[argv.index(option) + 1 :]:
        if word.startswith("--"):
            break
        found.append(word)
    return found


def _follow(core: "subprocess.Popen[bytes]", port: int) -> None:
    """What is in flight learns of the core's death with the next answer that is due. A core may die before the API
    server listens: it is told then."""
    core.wait()
    while True:
        with suppress(OSError):
            set_faults(port, Faults(core_dies_after=0))
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1:])
