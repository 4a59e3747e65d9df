"""Takes samples of something in a thread of its own while a scenario runs."""

import threading
from abc import ABC, abstractmethod
from typing import Self


class Sampler(ABC):
    """Calls `sample` every `pause_seconds`, from `with` on until its end."""

    def __init__(self, name: str, pause_seconds: float) -> None:
        self._pause_seconds = pause_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_over, name=name)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @abstractmethod
    def sample(self) -> None:
        """Look once. What it raises ends the sampling."""

    def _sample_until_over(self) -> None:
        while not self._over.wait(self._pause_seconds):
            self.sample()
