"""Run other programs for the set-up and report its steps in plain sentences.

Called by every other part of the set-up. Standard library only, and no syntax newer than Python 3.8: this runs before
any environment exists, with whatever `python3` is.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAIL_LINES = 15


class SetupError(Exception):
    """The set-up cannot go on: one sentence on what is wrong, one on the mend."""

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(f"{problem}\n{mend}")
        self.problem = problem
        self.mend = mend


class CommandFailed(Exception):
    """A program ended with another code than 0; carries what it printed."""

    def __init__(self, command: Sequence[str], code: int, output: str) -> None:
        super().__init__(f"{command[0]} ended with code {code}")
        self.command = list(command)
        self.output = output

    @property
    def last_line(self) -> str:
        """The last line with a statement in it, which is where installers put their error; their hints follow it."""
        lines = [line.strip() for line in self.output.splitlines()]
        telling = [line for line in lines if line and not line.startswith(("hint:", "note:", "×", "╰"))]
        return telling[-1] if telling else str(self)

    @property
    def tail(self) -> str:
        """The end of the output, indented for the terminal."""
        return "\n".join(f"    | {line}" for line in self.output.splitlines()[-TAIL_LINES:])


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Run a program in the project's folder and return what it printed. Raises CommandFailed."""
    result = subprocess.run(
        list(command),
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        raise CommandFailed(command, result.returncode, result.stdout)
    return result.stdout


def say(sentence: str) -> None:
    """One line for the reader, at once even through a pipe."""
    print(sentence, flush=True)


@contextlib.contextmanager
def step(title: str, mend: str) -> Iterator[None]:
    """Announce a step and its duration; a program that fails inside becomes a SetupError with this mend."""
    say(f"- {title}")
    started = time.monotonic()
    try:
        yield
    except CommandFailed as failure:
        say(failure.tail)
        raise SetupError(f"This step failed: {title} ({failure.last_line})", mend) from failure
    say(f"  done in {time.monotonic() - started:.1f} s")
