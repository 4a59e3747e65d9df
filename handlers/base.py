"""What a result handler is: a plug-in that takes the results of a finished batch somewhere else.

Called by the `deliveries` asset once a batch has been merged. There are two shapes, and both are found in the same way
(registry.py): the seed's `ResultHandler` with `handle(batch_id, results, metadata)`, and `Handler` below it, whose
`deliver(delivery)` also gets the batch, an idempotency key and the two files.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec

from vllm_batch_dagster.core.errors import DeliveryFailed, Undeliverable
from vllm_batch_dagster.core.models import Batch

__all__ = ["Batch", "Delivery", "DeliveryFailed", "Handler", "ResultHandler", "Results", "Undeliverable"]

Opener = Callable[[], BinaryIO | None]


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


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a handler is to take: the results of one batch.

    `key` is the same for each attempt at these results, and another one when a chunk was run again and the batch has
    new results; `version` then is higher. `attempt` counts from 1. `open_output` and `open_errors` give seekable
    readers of the two files, None for a file that the batch does not have.
    """

    batch: Batch
    key: str
    version: int
    attempt: int
    open_output: Opener
    open_errors: Opener

    @property
    def results(self) -> Results:
        """The lines of the output file, then of the error file."""
        return Results(lambda: _chained(self.open_output, self.open_errors))

    @property
    def output(self) -> Results:
        """The lines with a 2xx answer, in input order."""
        return Results(lambda: _chained(self.open_output))

    @property
    def errors(self) -> Results:
        """The lines without, in input order."""
        return Results(lambda: _chained(self.open_errors))


def _chained(*openers: Opener) -> Iterator[bytes]:
    for opener in openers:
        if (file := opener()) is not None:
            with file:
                yield from file


class Handler(ABC):
    """Subclass it and name the class in the entry-point group `vllm_batch.handlers`, or register an instance."""

    @abstractmethod
    def name(self) -> str:
        """Return the name under which its deliveries are stored and shown. It must not change."""

    @abstractmethod
    def enabled(self) -> bool:
        """Say whether this installation wants the handler; asked for every batch."""

    @abstractmethod
    def deliver(self, delivery: Delivery) -> None:
        """Take the results. Any exception means that they are to be given again later, Undeliverable that this would
        be useless. May be called again for the same `delivery.key`, and must then double nothing."""

    def check(self) -> None:  # noqa: B027 - to be overridden by who can check something
        """Raise when the handler could not work now (no connection, a missing variable). `vllm-batch doctor` asks."""


class ResultHandler(Handler):
    """The seed's shape: `name()`, `enabled()` and `handle()`."""

    @abstractmethod
    def handle(self, batch_id: str, results: Results, metadata: Mapping[str, str]) -> bool:
        """Deliver the results. `metadata` is the batch's. Return False or raise when it did not work.

        It may be called again for the same batch, so it must be idempotent by `batch_id`.
        """

    def deliver(self, delivery: Delivery) -> None:
        batch = delivery.batch
        if not self.handle(batch.id, delivery.results, dict(batch.metadata or {})):
            raise DeliveryFailed(f"the handler {self.name()} did not return True")
