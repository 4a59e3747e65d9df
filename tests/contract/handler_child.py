"""A process that delivers, for tests that kill it or measure it. `python -m tests.contract.handler_child ...`:

kill <state folder> <point>    one run of the batch's deliveries; dies at `committed` or in the `middle`
measure <handler> <file>       prints how much the process grew (bytes) by delivering a file of many lines
"""

import io
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from handlers.base import Handler
from handlers.buckets import Upload
from handlers.courier import HandlerCourier
from handlers.registry import load_handlers
from handlers.testing import three_kinds
from vllm_batch_dagster.adapters.local_files import LocalFiles
from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.adapters.store import open_store
from vllm_batch_dagster.core.deliveries import DeliveryRecord, Wanted
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import FileStore, OutboxEvent
from vllm_batch_dagster.core.webhooks import Outcome
from vllm_batch_dagster.stages.deliveries import DeliveryPorts, deliver_batch

COMMITTED, MIDDLE = "committed", "middle"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingCourier(HandlerCourier):
    """Dies when a handler has done its work, before anybody can note it."""

    def attempt(self, delivery: DeliveryRecord, batch: Batch, event: OutboxEvent) -> Outcome:
        super().attempt(delivery, batch, event)
        die()
        raise AssertionError("not reached")


class DyingReader(io.BufferedReader):
    """Dies when all of the file but an eighth has been read. Not at the first time by the handler `parquet`, which
    reads the lines once before it writes."""

    times_left = 2 if "HANDLER_PARQUET_URL" in os.environ else 1

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path))
        self._end = Path(path).stat().st_size * 7 // 8

    def __next__(self) -> bytes:
        self._look()
        return super().__next__()

    def read(self, size: int | None = -1, /) -> bytes:
        self._look()
        return super().read(size)

    def _look(self) -> None:
        if self.tell() > self._end:
            self._end = 1 << 62
            DyingReader.times_left -= 1
            if DyingReader.times_left == 0:
                die()


class DyingFiles(LocalFiles):
    def open(self, file_id: str) -> BinaryIO:
        reader = super().open(file_id)
        reader.close()
        return DyingReader(reader.name)


def deliver(folder: Path, courier: HandlerCourier, now: int, run_id: str) -> Sequence[DeliveryRecord]:
    """Run the deliveries of `batch_kill` that are due, as the asset does."""
    store = open_store(f"sqlite:///{folder / 'batches.db'}")
    try:
        ports = DeliveryPorts(store, [courier], FixedClock(now))
        return deliver_batch("batch_kill", ports, Wanted.DUE, run_id=run_id)
    finally:
        store.close()


def die_after_a_part() -> None:
    """Die when the first part of an object is on the server."""
    send = Upload._send

    def send_and_die(upload: Upload) -> None:
        send(upload)
        die()

    Upload._send = send_and_die  # type: ignore[method-assign]  # die between two parts, which no public call allows


def kill(folder: Path, point: str) -> None:
    uploads = "HANDLER_S3_ENDPOINT_URL" in os.environ
    if point == MIDDLE and uploads:
        die_after_a_part()
    files: FileStore = (DyingFiles if point == MIDDLE and not uploads else LocalFiles)(folder / "files")
    kind = DyingCourier if point == COMMITTED else HandlerCourier
    deliver(folder, kind(files, limit_seconds=600), int((folder / "now").read_text()), "first run")


def measure(name: str, path: str) -> None:
    handler = next(each for each in load_handlers() if isinstance(each, Handler) and each.name() == name)
    handler.deliver(three_kinds("batch_small").delivery())  # what the libraries take is not counted
    before = peak()
    handler.deliver(replace(three_kinds("batch_large").delivery(), open_output=partial(Path(path).open, "rb")))
    sys.stdout.write(f"{peak() - before}\n")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    action, first, second = sys.argv[1:]
    kill(Path(first), second) if action == "kill" else measure(first, second)
