"""What pausing needs from the outside world: where pauses are kept, and what is looked at to find that one is due."""

from collections.abc import Sequence
from typing import Protocol

from vllm_batch_dagster.core.pauses import Pause, PauseCause


class PauseRecords(Protocol):
    """The pauses of the batch store: at most one of a cause and a scope."""

    def list(self) -> Sequence[Pause]:
        """All, also those whose time is over (a breaker remembers its strikes), oldest first."""

    def put(self, pause: Pause) -> None:
        """Store it durably in the place of the one with its scope and cause."""

    def remove(self, scope: str, cause: PauseCause) -> bool:
        """True when there was one."""


class Watch(Protocol):
    """A state of the machine that may ask for a pause of everything."""

    @property
    def cause(self) -> PauseCause: ...

    def look(self, standing: Pause | None, now: float) -> Pause | None:
        """Return the pause that is due at `now`; `standing` is the one that holds so far, and comes back unchanged
        while nothing that matters has changed. Raises nothing."""
