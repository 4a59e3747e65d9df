"""Watches whether services that are up still answer: a process that hangs is as bad as one that died.

The supervisor asks `silent_seconds` in its loop; the services are asked in a thread, because one that hangs takes the
asker's time. Seen for real: Dagster's code server waits for ever for a lock that it shares with a run's process, and
then starts no run any more, though it is alive and listens.
"""

import threading
import time
from collections.abc import Callable, Sequence

Check = tuple[str, Callable[[], bool]]


class Pulse:
    """Asks every `pause_seconds` those that `checks` names, by name. `clock` in seconds, of any origin."""

    def __init__(
        self,
        checks: Callable[[], Sequence[Check]],
        pause_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checks, self._pause_seconds, self._clock = checks, pause_seconds, clock
        self._first_miss: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask_for_ever, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """A question that is under way ends by itself."""
        self._over.set()

    def silent_seconds(self, name: str) -> float:
        """Return for how long a service has not answered; 0 for one that has, and for one that nobody asked."""
        missed = self._first_miss.get(name)
        return 0.0 if missed is None else self._clock() - missed

    def forget(self, name: str) -> None:
        """The service begins a new life."""
        self._first_miss.pop(name, None)

    def _ask_for_ever(self) -> None:
        while not self._over.wait(self._pause_seconds):
            self.ask_all()

    def ask_all(self) -> None:
        """Ask each service once."""
        for name, answers in self._checks():
            asked_at = self._clock()
            if answers():
                self.forget(name)
            else:
                self._first_miss.setdefault(name, asked_at)
