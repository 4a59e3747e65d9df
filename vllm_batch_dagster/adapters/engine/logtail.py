"""The end of the engine's log, as sentences for the person who waits and for the error when it did not start."""

import re
from pathlib import Path

_TAIL_BYTES = 256 << 10
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

LAST_LINES = 30
CLASSIFIED_LINES = 4000


def read_tail(log: Path, offset: int, lines: int = LAST_LINES) -> list[str]:
    """Return the last `lines` lines that were written at or after `offset`, without terminal escapes."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(offset, end - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    # Progress bars overwrite their line with carriage returns.
    cleaned = (_ESCAPES.sub("", line).rstrip() for line in re.split(r"[\r\n]+", text))
    return [line for line in cleaned if line][-lines:]


def last_said(log: Path, offset: int) -> str:
    """Return what the engine wrote last, in at most 160 characters; empty when nothing."""
    tail = read_tail(log, offset, 1)
    return tail[0].strip()[:160] if tail else ""
