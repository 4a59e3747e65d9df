"""`make lock`: compile every requirements/*.in to the lock beside it, for Python 3.11 to 3.13 and any platform.

Run by whoever raises a version; the locks are committed. Uses the uv of the orchestrator environment with the machine's
pip settings, and writes neither into the locks.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.commands import CommandFailed, say
from scripts.installers import BOOTSTRAP, Pip, Uv

CLIENTS = ("clients/openai-1.60", "clients/openai-batch-0.3.3", "clients/openai-batch-0.3.4")
# In this order: the second is constrained by the first.
NAMES = ("orchestrator", "dev", "engine-cpu", "engine-cuda", "label-studio", *CLIENTS)
# Text models do not import these three, and the ordinary index has them for the CUDA build of torch only.
LEFT_OUT = {"engine-cpu": ("torchvision", "torchaudio", "torchcodec")}
OPTIONS = ("--universal", "--python-version", "3.11", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links")


def get_arguments(name: str) -> list[str]:
    """uv's command for one lock."""
    left_out = [part for package in LEFT_OUT.get(name, ()) for part in ("--no-emit-package", package)]
    files = [f"requirements/{name}.in", "--output-file", f"requirements/{name}.txt"]
    return ["pip", "compile", *OPTIONS, *left_out, *sys.argv[1:], *files]


def main() -> int:
    """Write all locks; further arguments go to uv (`--upgrade`, `--upgrade-package vllm`). Returns the exit code."""
    home = Path(sys.prefix)
    try:
        pip = Pip(home)
        pip.install(home, ["-r", BOOTSTRAP])
        uv = Uv(home, pip.read_settings())
        for name in NAMES:
            uv.run(get_arguments(name), {"UV_CUSTOM_COMPILE_COMMAND": "make lock"})
            say(f"requirements/{name}.txt is written.")
    except CommandFailed as failure:
        say(failure.tail)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
