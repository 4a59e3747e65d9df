"""`make demo`: one real batch from end to end, as a user would run it, in a state folder of its own.

Starts the whole stack, sends examples/questions.jsonl through the official `openai` client, shows the progress, checks
all answers, prints three of them and where everything is, and stops what it started. Exit code 0 only if it all holds.
With `--keep` it waits for Enter before it stops, so that the UI can be looked at.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import openai
import polars
from openai.types import Batch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from scripts.commands import ROOT
from scripts.stack import QUESTIONS, EngineWords, Stack, StackFailed, poll, running_stack, submit, wait_until_idle

HOME = Path(os.environ.get("VLLM_BATCH_HOME", ROOT / ".vllm-batch-demo")).absolute()
BATCH_SECONDS = 600
SHOWN = ("capital-japan", "why-sky-blue", "python-reverse")
STEPS = ("in_progress", "finalizing", "completed", "cancelling", "cancelled", "expired", "failed")

console = Console(highlight=False)


class Meter:
    """Tokens per second of the engine: from the moment it was ready to the newest answer."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._ended = 0.0
        self._tokens = 0

    def read(self, batch: Batch, is_engine_ready: bool) -> None:
        now, tokens = time.monotonic(), batch.usage.total_tokens if batch.usage else 0
        if self._began is None and (is_engine_ready or tokens):
            self._began = now
        if tokens > self._tokens:
            self._tokens, self._ended = tokens, now

    def __str__(self) -> str:
        if self._began is None or self._ended <= self._began:
            return ""
        return f"{self._tokens / (self._ended - self._began):.0f} tokens/s"


def follow(stack: Stack, batch_id: str) -> tuple[Batch, Meter]:
    """Poll the batch until it has ended, with a live bar and, while no answer is there, what the engine is doing."""
    words, meter = EngineWords(stack.log), Meter()
    bar = Progress(
        TextColumn("{task.description:<11}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=console,
    )
    task = bar.add_task("validating", total=None, rate="")
    with live_view(bar) as live:
        for batch in poll(stack, batch_id, BATCH_SECONDS):
            sentence, counts = words.latest(), batch.request_counts
            meter.read(batch, " is ready" in sentence)
            done = counts.completed + counts.failed if counts else 0
            total = (counts.total if counts else 0) or None
            bar.update(task, description=batch.status, completed=done, total=total, rate=str(meter))
            note = Text(f"  {sentence.partition(';')[0]}", style="dim", no_wrap=True, overflow="ellipsis")
            live.update(Group(bar, note) if sentence and not done else bar)
    return batch, meter


@contextmanager
def live_view(bar: Progress) -> Iterator[Live]:
    try:
        with Live(bar, console=console) as live:
            yield live
    finally:
        if not console.is_terminal:
            console.print()  # rich ends the line on a terminal only


def describe_path(batch: Batch) -> str:
    """Return the statuses of the batch with the seconds in each, from its own timestamps: polling may miss one."""
    reached = {"validating": batch.created_at}
    reached |= {step: at for step in STEPS if (at := getattr(batch, f"{step}_at")) is not None}
    path = sorted(reached.items(), key=lambda item: item[1])
    spans = [f"{name} {after[1] - at} s" for (name, at), after in pairwise(path)]
    return " → ".join([*spans, path[-1][0]])


def check(client: openai.OpenAI, batch: Batch) -> dict[str, str]:
    """Return custom_id -> answer. Raises StackFailed unless every question has one well-formed answer, in order."""
    if batch.status != "completed" or batch.error_file_id or not batch.output_file_id:
        raise StackFailed(f"the batch ended as {batch.status}: {_why(client, batch)}")
    asked = [json.loads(line)["custom_id"] for line in QUESTIONS.read_text().splitlines()]
    lines = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    if [line["custom_id"] for line in lines] != asked:
        raise StackFailed("the output does not hold every custom_id exactly once in input order")
    answers = {}
    for line in lines:
        choice = line["response"]["body"]["choices"][0]
        if line["response"]["status_code"] != 200 or not choice["message"]["content"].strip():
            raise StackFailed(f"the answer to {line['custom_id']} is malformed: {line}")
        answers[line["custom_id"]] = choice["message"]["content"].strip()
    return answers


def _why(client: openai.OpenAI, batch: Batch) -> str:
    """Return the first thing that went wrong in a batch."""
    if batch.errors and batch.errors.data:
        return str(batch.errors.data[0].message)
    if batch.error_file_id:
        return client.files.content(batch.error_file_id).text.partition("\n")[0]
    return "it has no output file"


def find_dataset(batch: Batch) -> tuple[Path, int]:
    """Return the folder of the curated answers and their number. Raises StackFailed when it is not there."""
    folder = HOME / "datasets" / "curated" / f"batch={batch.id}"
    parts = sorted(folder.glob("*.parquet"))
    if not parts:
        raise StackFailed(f"there is no Parquet dataset in {folder}")
    return folder, int(polars.scan_parquet(parts).select(polars.len()).collect().item())


def present(stack: Stack, batch: Batch, meter: Meter, answers: dict[str, str]) -> None:
    """Print three answers and where everything is. Paths and URLs stand alone on a line, so that they can be copied."""
    for name in SHOWN:
        console.print(Panel(Text(answers[name]), title=name, title_align="left", width=min(80, console.width)))
    tokens = batch.usage.total_tokens if batch.usage else 0
    console.print(f"[green]All {len(answers)} answers are there:[/] {tokens} tokens, {meter}")
    folder, rows = find_dataset(batch)
    show("Output file", str(stack.home / "files" / str(batch.output_file_id)))
    show(f"Parquet dataset: the {rows} answers that ended by themselves", str(folder))
    show(
        "In the Dagster UI: the graph, the first chunk, the merged output",
        f"{stack.dagster_url}/asset-groups",
        f"{stack.dagster_url}/assets/chunk_results?view=partitions&partition={batch.id}%7C0000",
        f"{stack.dagster_url}/assets/merged_output?view=partitions&partition={batch.id}",
    )


def show(label: str, *places: str) -> None:
    console.print(Text(label, style="bold"))
    for place in places:
        # The terminal wraps it, we do not: a line break of ours would be copied with it.
        console.print(Text(f"  {place}"), soft_wrap=True)


def run_demo() -> None:
    with console.status("Starting the API, the Dagster UI, its daemon and the code server …") as status:
        # Chunks of ten lines, so that the UI has several to show.
        settings = {"UI_SAMPLES": "true", "CHUNK_SIZE": os.environ.get("CHUNK_SIZE", "10")}
        with running_stack(HOME, settings) as stack:
            status.stop()
            try:
                run_batch(stack)
            finally:
                status.update("Stopping everything …")
                status.start()


def run_batch(stack: Stack) -> None:
    batch, meter = follow(stack, submit(stack.client))
    console.print(describe_path(batch), soft_wrap=True)
    answers = check(stack.client, batch)
    wait_until_idle(stack)
    present(stack, batch, meter, answers)
    if "--keep" in sys.argv:
        console.input("The stack is still running. Press Enter to stop it. ")


def main() -> int:
    # A closed terminal or a `kill` stops the stack as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        run_demo()
    except (StackFailed, openai.OpenAIError, OSError) as error:
        console.print(Text.assemble(("The demo failed: ", "red"), str(error)), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("[red]The demo was interrupted.[/] Everything is stopped.")
        return 130
    console.print("Everything is stopped. To look at the batch in the UI, start the stack again:")
    console.print(Text(f"  VLLM_BATCH_HOME={HOME} make up"), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
