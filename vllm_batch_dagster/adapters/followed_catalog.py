"""The models of the catalogue file as it is now: read again when the file has changed. Made by adapters/catalog.py.

In: a file that a person edits while the API runs. Out: see ModelCatalog. A change is seen within 10 s.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock

from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.core.models import Model

LOOK_SECONDS = 10.0


class FollowedCatalog:
    """`read` gives the models of `path`. While it raises ConfigurationError, those of before hold: somebody may be half
    way through an edit. `clock` in seconds, of any origin."""

    def __init__(
        self,
        path: Path,
        models: Sequence[Model],
        read: Callable[[], Sequence[Model]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._read, self._clock = path, read, clock
        self._lock = Lock()
        self._keep(models)
        self._mark, self._next_look = self._look(), clock() + LOOK_SECONDS

    def find(self, name: str) -> Model | None:
        self.all()
        return self._by_name.get(name)

    def all(self) -> Sequence[Model]:
        if self._clock() >= self._next_look:
            with self._lock:
                self._follow()
        return self._models

    def _follow(self) -> None:
        if (now := self._clock()) < self._next_look:
            return  # another thread has looked
        self._next_look = now + LOOK_SECONDS
        if (mark := self._look()) == self._mark:
            return
        try:
            self._keep(self._read())
            self._mark = mark
        except ConfigurationError:
            return

    def _keep(self, models: Sequence[Model]) -> None:
        self._models = tuple(models)
        self._by_name = {name: model for model in reversed(self._models) for name in model.names}

    def _look(self) -> tuple[int, int] | None:
        """Return what changes with the file; None when it is not there."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size
