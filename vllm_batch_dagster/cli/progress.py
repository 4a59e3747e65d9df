"""The live picture of one batch: polls the API until the batch is finished. Used by `watch` and `submit --watch`."""

import time
from dataclasses import dataclass

import openai
from openai.types import Batch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vllm_batch_dagster.cli.api_client import is_terminal
from vllm_batch_dagster.cli.console import out

POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What the API said about a batch at `at` (seconds, monotonic)."""

    at: float
    done: int
    tokens: int


def read_batch(batch: Batch, at: float) -> Reading:
    counts = batch.request_counts
    return Reading(
        at=at,
        done=counts.completed + counts.failed if counts else 0,
        tokens=batch.usage.output_tokens if batch.usage else 0,
    )


def describe_rate(first: Reading, last: Reading) -> str:
    """Return `12 tokens/s`, or `3.4 lines/s` while the API tells no tokens; empty before there is a rate."""
    seconds = last.at - first.at
    if seconds <= 0 or last.done <= first.done:
        return ""
    if last.tokens > first.tokens:
        return f"{(last.tokens - first.tokens) / seconds:.0f} tokens/s"
    return f"{(last.done - first.done) / seconds:.1f} lines/s"


def follow_batch(client: openai.OpenAI, batch_id: str) -> Batch:
    """Show a progress bar until the batch is finished, and return it as it ended."""
    with _new_bar() as bar:
        task = bar.add_task(batch_id, total=None, rate="", status="", failed="")
        batch = client.batches.retrieve(batch_id)
        first = read_batch(batch, time.monotonic())
        while True:
            _paint(bar, task, batch, describe_rate(first, read_batch(batch, time.monotonic())))
            if is_terminal(batch):
                return batch
            time.sleep(POLL_SECONDS)
            batch = client.batches.retrieve(batch_id)


def _new_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        TextColumn("[bold]{task.fields[status]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=out,
    )


def _paint(bar: Progress, task: TaskID, batch: Batch, rate: str) -> None:
    counts = batch.request_counts
    failed = counts.failed if counts else 0
    bar.update(
        task,
        total=(counts.total if counts else 0) or None,
        completed=read_batch(batch, 0).done,
        status=batch.status,
        failed=f"[red]{failed} failed[/]" if failed else "",
        rate=rate,
    )
