"""Reads a batch's `completion_window`. Called when a batch is created; the deadline follows from it.

OpenAI knows `24h` alone. Ours is a number and one unit, `m`, `h` or `d`, from 1 minute to 30 days: `90m`, `6h`, `7d`.
"""

import re
from enum import StrEnum

SHORTEST_SECONDS = 60
LONGEST_SECONDS = 30 * 86_400
PATTERN = "^[1-9][0-9]{0,4}[mhd]$"
OPENAI_WINDOW = "24h"

_UNITS = {"m": 60, "h": 3_600, "d": 86_400}
_WINDOW = re.compile(PATTERN, re.ASCII)


class WindowRule(StrEnum):
    """Which windows a server takes. The value is what COMPLETION_WINDOWS says."""

    ANY = "any"
    OPENAI = "24h"


def window_seconds(text: str, rule: WindowRule) -> int | None:
    """Return the length of a window, None for one that `rule` does not allow."""
    if rule is WindowRule.OPENAI and text != OPENAI_WINDOW:
        return None
    if not _WINDOW.fullmatch(text):
        return None
    seconds = int(text[:-1]) * _UNITS[text[-1]]
    return seconds if SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS else None


def describe_windows(rule: WindowRule) -> str:
    """Return what a refusal lists as supported."""
    if rule is WindowRule.OPENAI:
        return f"'{OPENAI_WINDOW}'"
    return f"'{OPENAI_WINDOW}', and a number with one unit (m, h or d) from '1m' to '30d'"
