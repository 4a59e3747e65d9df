"""What to do with the engine's answer to one line: keep it, send the line again, or bring the engine back first.

The table follows measurements of vLLM 0.32 (an aborted request is a 200 with `finish_reason: abort`; a dead engine
core is a 500 that names EngineCore; a stopping server is a 500 with "after shutdown"; overload is a 503).
"""

from dataclasses import dataclass
from enum import StrEnum

from vllm_batch_dagster.core.answers import read_answer
from vllm_batch_dagster.core.ports import EngineAnswer

_BAD_FINISH = frozenset({"abort", "error"})
_BUSY = frozenset({429, 503})
_RETRYABLE = frozenset({408, 425, 500, 502, 504})
_ENGINE_DOWN_WORDS = (b"EngineCore", b"EngineDead", b"after shutdown")


class Verdict(StrEnum):
    """What an answer means for its line."""

    SUCCESS = "success"
    REJECTED = "rejected"
    """Final: the request itself is wrong; the answer goes to the error file."""
    FAULT = "fault"
    """The engine failed on this request; try again, counted against the line."""
    BUSY = "busy"
    """The engine is overloaded; try again later, not counted."""
    ENGINE_DOWN = "engine_down"
    """The engine is gone; bring it back and try again, not counted."""


def judge(answer: EngineAnswer) -> Verdict:
    """Classify an answer."""
    if 200 <= answer.status < 300:
        return _judge_success(answer.body)
    if answer.status in _BUSY:
        return Verdict.BUSY
    if answer.status >= 500 and any(word in answer.body for word in _ENGINE_DOWN_WORDS):
        return Verdict.ENGINE_DOWN
    if answer.status in _RETRYABLE:
        return Verdict.FAULT
    return Verdict.REJECTED


def _judge_success(body: bytes) -> Verdict:
    facts = read_answer(body)
    # A page of a proxy, or nothing, is no answer of an engine.
    if not facts.is_object or _BAD_FINISH.intersection(facts.finish_reasons):
        return Verdict.FAULT
    return Verdict.SUCCESS


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`line_attempts` bounds the FAULT answers of one line; delays in seconds, doubling from `base` up to `cap`."""

    line_attempts: int = 4
    base: float = 0.5
    cap: float = 8.0

    def is_spent(self, faults: int) -> bool:
        """True when a line with this many FAULT answers must keep the last one."""
        return faults >= self.line_attempts

    def delay(self, tries: int) -> float:
        """Return the pause before try number `tries` + 1."""
        return float(min(self.cap, self.base * 2 ** min(tries - 1, 16)))
