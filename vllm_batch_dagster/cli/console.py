"""The terminal: results go to stdout, complaints to stderr with the program's name before them."""

import json
import sys
from typing import Any

import typer
from rich.console import Console

PROGRAM = "vllm-batch"

# A pipe has no width: do not cut for it what a terminal would show.
PIPE_WIDTH = 200

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def fail(sentence: str) -> int:
    """Say what went wrong and return the exit code for it."""
    typer.echo(f"{PROGRAM}: {sentence}", err=True)
    return 1


def print_json(value: Any) -> None:
    """Print machine-readable output."""
    typer.echo(json.dumps(value, indent=2))
