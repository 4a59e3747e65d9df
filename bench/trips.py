"""One batch through the product, as a client sees it: upload, create, poll, download."""

import time
from dataclasses import dataclass
from pathlib import Path

from bench.dagster_runs import refuse_failures, wait_until_over
from bench.dataset import write_chat_file
from bench.errors import BenchFailed
from bench.stack import Stack

_POLL_SECONDS = 0.2
_BATCH_SECONDS = 900
_LOOK_SECONDS = 15
_END_SECONDS = 120
_ENDED = {"completed", "failed", "expired", "cancelled"}


@dataclass(frozen=True, slots=True)
class Trip:
    """Unix seconds: before the upload, after the creation, when `completed` was seen, when the output was read."""

    batch_id: str
    submitted: float
    accepted: float
    completed: float
    readable: float

    @property
    def seconds(self) -> float:
        """From submit to output readable."""
        return self.readable - self.submitted


def send_batch(stack: Stack, path: Path, limit: float = _BATCH_SECONDS) -> Trip:
    """Take the file through the product and wait until its last run is over, `limit` seconds at most.

    Raises BenchFailed unless every line has an answer.
    """
    submitted = time.time()
    with path.open("rb") as file:
        uploaded = stack.client.files.create(file=file, purpose="batch")
    batch_id = stack.client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
    ).id
    accepted = time.time()
    output_id = _wait(stack, batch_id, limit)
    completed = time.time()
    lines = _count_lines(stack, output_id)
    readable = time.time()
    if lines != (expected := path.read_bytes().count(b"\n")):
        raise BenchFailed(f"{batch_id} has {lines} answers for {expected} lines")
    wait_until_over(stack.dagster_url, batch_id, max(_END_SECONDS, limit / 6))
    return Trip(batch_id, submitted, accepted, completed, readable)


def warm_up(stack: Stack, model: str) -> None:
    """Let the engine start and answer a few lines, so that the next batch meets it warm."""
    send_batch(stack, write_chat_file(stack.folder / "warm-up.jsonl", 8, model, 8))


def _wait(stack: Stack, batch_id: str, limit: float) -> str:
    """Return the output file's id."""
    began = looked = time.monotonic()
    while (batch := stack.client.batches.retrieve(batch_id)).status not in _ENDED:
        now = time.monotonic()
        if now > began + limit:
            raise BenchFailed(f"{batch_id} is still {batch.status} after {limit:.0f} s")
        if now > looked + _LOOK_SECONDS:
            looked = now
            refuse_failures(stack.dagster_url, batch_id)
        time.sleep(_POLL_SECONDS)
    if batch.status != "completed" or batch.error_file_id or not batch.output_file_id:
        raise BenchFailed(f"{batch_id} ended as {batch.status}: {batch.errors or batch.error_file_id}")
    return batch.output_file_id


def _count_lines(stack: Stack, file_id: str) -> int:
    with stack.client.files.with_streaming_response.content(file_id) as response:
        return sum(block.count(b"\n") for block in response.iter_bytes(1 << 18))
