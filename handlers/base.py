"""What a result handler is: a plug-in that takes the results of a finished batch somewhere else.

Called by the `deliveries` asset once a batch has been merged. The shape is the seed's: `name()`, `enabled()`,
`handle(batch_id, results, metadata)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec


class Results:
    """The lines of a batch's output and error file as dictionaries, read anew on every iteration, one at a time."""

    def __init__(self, read_lines: Callable[[], Iterator[bytes]]) -> None:
        self._read_lines = read_lines

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._read_lines():
            yield msgspec.json.decode(line)

    def lines(self) -> Iterator[bytes]:
        """Yield the raw lines, newline included, without parsing them."""
        return self._read_lines()


class ResultHandler(ABC):
    """Subclass it and name the class in the entry-point group `vllm_batch.handlers`."""

    @abstractmethod
    def name(self) -> str:
        """Return the name under which deliveries are shown."""

    @abstractmethod
    def enabled(self) -> bool:
        """Say whether this installation wants the handler; asked for every batch."""

    @abstractmethod
    def handle(self, batch_id: str, results: Results, metadata: Mapping[str, str]) -> bool:
        """Deliver the results. `metadata` is the batch's. Return False or raise when it did not work.

        It may be called again for the same batch, so it must be idempotent by `batch_id`.
        """
