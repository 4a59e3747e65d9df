"""A pause: nothing new is sent for a while, and nothing is lost, counted or given up. Read by the sensor and by runs.

Five causes: an operator said so; the clock is outside DISPATCH_HOURS; the GPU is not well; the engine cannot be had (a
circuit breaker); bytes cannot be stored. What is in flight when a pause begins may finish. Deadlines go on.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from vllm_batch_dagster.core.models import Model

ALL = "all"
PAUSED = "paused"  # how an attempt ends that a pause has cut
LATCHED = "latched"  # mark of a pause that only an operator ends
_MODEL = "model:"
_FIRST_SECONDS, _LONGEST_SECONDS = 30.0, 600.0


class PauseCause(StrEnum):
    """Why nothing is sent. Of several pauses that last equally long, the first of this list is shown."""

    OPERATOR = "operator"
    SCHEDULE = "schedule"
    GPU = "gpu"
    ENGINE = "engine"
    STORAGE = "storage"


_ORDER = tuple(PauseCause)


@dataclass(frozen=True, slots=True)
class Pause:
    """One pause of one cause. `scope` is `all`, the id of a batch, or `model:<name>`. Times in unix seconds; `until`
    None: until somebody ends it. `strikes` counts how often in a row a breaker opened. `mark` says what must change
    first: the configuration that an engine failed with, or LATCHED."""

    scope: str
    cause: PauseCause
    reason: str
    since: int
    until: int | None = None
    strikes: int = 0
    mark: str = ""

    def holds(self, now: float) -> bool:
        return self.until is None or now < self.until

    def covers(self, batch_id: str, model: str | None) -> bool:
        """True for a batch that this pause stops; `model` is that of the lines in question."""
        return self.scope in (ALL, batch_id) or (model is not None and self.scope == model_scope(model))

    def describe(self) -> str:
        """Return one sentence for logs: the cause, the reason, and until when."""
        end = f" (until {show_time(self.until)})" if self.until is not None else ""
        return f"paused by {self.cause.value}: {self.reason}{end}"


def show_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def model_scope(model: str) -> str:
    """Return the scope of everything that waits for one model."""
    return f"{_MODEL}{model}"


def model_of_scope(scope: str) -> str | None:
    return scope.removeprefix(_MODEL) if scope.startswith(_MODEL) else None


def find_pause(pauses: Iterable[Pause], batch_id: str, model: str | None, now: float) -> Pause | None:
    """Return the pause that stops a batch at `now`, of several the one that ends last; None when it may go on."""
    standing = (pause for pause in pauses if pause.holds(now) and pause.covers(batch_id, model))
    return min(standing, key=_rank, default=None)


def _rank(pause: Pause) -> tuple[bool, int, int]:
    return (pause.until is not None, -(pause.until or 0), _ORDER.index(pause.cause))


def back_off(strikes: int) -> float:
    """Return how long (seconds) a breaker stays open that opens for this time in a row, counted from 1."""
    return float(min(_LONGEST_SECONDS, _FIRST_SECONDS * 2 ** min(strikes - 1, 16)))


def trip(
    before: Pause | None,
    scope: str,
    cause: PauseCause,
    reason: str,
    now: float,
    *,
    lasting: bool = False,
    mark: str = "",
) -> Pause:
    """Open a breaker. `before` is what it left when it opened last, if nothing worked since. A `lasting` one has no end
    of its own: trying again cannot help."""
    strikes = (before.strikes if before else 0) + 1
    until = None if lasting else int(now + back_off(strikes))
    since = before.since if before else int(now)
    return Pause(scope, cause, reason, since, until, strikes, mark if lasting else "")


def configuration_mark(model: Model | None, engine: str) -> str:
    """Return what changes when the entry of a model, or the engine's settings (`engine`), change."""
    return hashlib.sha256(f"{model!r}\n{engine}".encode()).hexdigest()[:16]
