"""Reads what an engine start reads, once before the first measurement: a cold disk is not what is compared."""

import subprocess
from contextlib import suppress
from pathlib import Path

from bench.terminal import say
from vllm_batch_dagster.adapters.engine.launch import Launch

_BLOCK = 1 << 20
_HELP_SECONDS = 300


def read_ahead(launch: Launch) -> None:
    """Bring the model's files and vLLM's modules into the page cache."""
    say("reading the model and vLLM's modules once")
    folder = Path(launch.model.path)
    for path in folder.rglob("*") if folder.is_dir() else ():
        with suppress(OSError), path.open("rb") as file:
            while file.read(_BLOCK):
                pass
    command = [*launch.argv[: launch.argv.index("serve")], "run-batch", "--help"]
    subprocess.run(command, capture_output=True, timeout=_HELP_SECONDS, cwd="/", check=False)
