"""`make demo`: one real batch from end to end, as a user would run it, in a state folder of its own.

Starts the whole stack, sends examples/questions.jsonl through the official `openai` client, shows the progress, checks
all answers, prints three of them and where everything is, and stops what it started. Exit code 0 only if it all holds.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ROOT / "examples" / "questions.jsonl"
HOME = Path(os.environ.get("VLLM_BATCH_HOME", ROOT / ".vllm-batch-demo"))
BATCH_SECONDS = 600
TERMINAL = {"completed", "failed", "expired", "cancelled"}
SHOWN = ("capital-japan", "why-sky-blue", "python-reverse")

console = Console()


class DemoFailed(Exception):
    """The demo did not do what it promises; the message says what is wrong."""


def choose_port(wanted: int) -> int:
    """Return `wanted`, or a free port when another program has it."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_stack(environment: dict[str, str]) -> Iterator[None]:
    """Run `vllm-batch up` until the block ends; then stop it, the engine included."""
    command = [str(Path(sys.executable).with_name("vllm-batch")), "up"]
    log = HOME / "demo.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        stack = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            wait_until_ready(stack, environment, log)
            yield
        finally:
            stack.send_signal(signal.SIGINT)
            stack.wait(timeout=90)


def wait_until_ready(stack: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    """Wait for the API and for the Dagster UI, which comes up last."""
    ports = [int(environment["DAGSTER_PORT"]), int(environment["API_PORT"])]
    deadline = time.monotonic() + 120
    with console.status("Starting the API, the Dagster UI, the daemon and the code server …"):
        while not all(map(answers, ports)):
            if stack.poll() is not None or time.monotonic() > deadline:
                raise DemoFailed(f"the stack did not start:\n{tail(log)}")
            time.sleep(0.3)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def submit(client: openai.OpenAI) -> str:
    """Upload the questions and create the batch: the two calls of OpenAI's guide."""
    with QUESTIONS.open("rb") as questions:
        uploaded = client.files.create(file=questions, purpose="batch")
    batch = client.batches.create(
        input_file_id=uploaded.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"name": "demo"},
    )
    return batch.id


def follow(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    """Poll the batch until it has ended, with a live bar: counts and answers per second."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    seen: list[str] = []
    deadline = time.monotonic() + BATCH_SECONDS
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("validating", total=None, rate="")
        while time.monotonic() < deadline:
            batch = client.batches.retrieve(batch_id)
            if batch.status not in seen:
                seen.append(batch.status)
            show(progress, task, batch)
            if batch.status in TERMINAL:
                console.print("Statuses seen: " + " → ".join(seen))
                return batch
            time.sleep(0.5)
    raise DemoFailed(f"{batch_id} did not finish within {BATCH_SECONDS} s: see {HOME / 'demo.log'}")


def show(progress: Progress, task: object, batch: openai.types.Batch) -> None:
    counts = batch.request_counts
    done = counts.completed + counts.failed if counts else 0
    total = (counts.total or None) if counts else None
    progress.update(task, description=batch.status, completed=done, total=total, rate=rate_of(batch))  # type: ignore[arg-type]


def rate_of(batch: openai.types.Batch) -> str:
    """Return tokens per second once the engine has reported usage, from the start of the work to its end."""
    if not batch.usage or not batch.in_progress_at:
        return "starting the engine …" if batch.status == "in_progress" else ""
    seconds = max(1, (batch.completed_at or time.time()) - batch.in_progress_at)
    return f"{batch.usage.total_tokens / seconds:.0f} tokens/s"


def check(client: openai.OpenAI, batch: openai.types.Batch) -> dict[str, str]:
    """Return custom_id -> answer. Raises DemoFailed unless every question has one well-formed answer, in order."""
    if batch.status != "completed" or batch.error_file_id or not batch.output_file_id:
        raise DemoFailed(f"the batch ended as {batch.status}: {batch.errors or batch.error_file_id}")
    asked = [json.loads(line)["custom_id"] for line in QUESTIONS.read_text().splitlines()]
    lines = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    if [line["custom_id"] for line in lines] != asked:
        raise DemoFailed("the output does not hold every custom_id exactly once in input order")
    answers = {}
    for line in lines:
        choice = line["response"]["body"]["choices"][0]
        if line["response"]["status_code"] != 200 or not choice["message"]["content"].strip():
            raise DemoFailed(f"the answer to {line['custom_id']} is malformed: {line}")
        answers[line["custom_id"]] = choice["message"]["content"].strip()
    return answers


def present(batch: openai.types.Batch, answers: dict[str, str], environment: dict[str, str]) -> None:
    for name in SHOWN:
        console.print(Panel(answers[name], title=name, title_align="left", width=100))
    api, dagster = (f"http://127.0.0.1:{environment[name]}" for name in ("API_PORT", "DAGSTER_PORT"))
    usage = batch.usage
    console.print(f"[green]All {len(answers)} answers are there.[/] Tokens: {usage.total_tokens if usage else 0}")
    console.print(f"Output file    {HOME / 'files' / str(batch.output_file_id)}")
    console.print(f"               {api}/v1/files/{batch.output_file_id}/content")
    for asset, partition in (
        ("validated_input", batch.id),
        ("chunk_results", f"{batch.id}|0000"),
        ("merged_output", batch.id),
        ("curated_export", batch.id),
    ):
        console.print(f"{asset:<15}{dagster}/assets/{asset}?view=partitions&partition={partition}", soft_wrap=True)


def main() -> int:
    environment = dict(os.environ)
    environment |= {
        "VLLM_BATCH_HOME": str(HOME),
        "UI_SAMPLES": "true",
        "API_PORT": str(choose_port(4080)),
        "DAGSTER_PORT": str(choose_port(3000)),
        "CODE_SERVER_PORT": str(choose_port(4266)),
    }
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{environment['API_PORT']}/v1", api_key="unused")
    try:
        with running_stack(environment):
            batch = follow(client, submit(client))
            present(batch, check(client, batch), environment)
            if "--keep" in sys.argv:
                console.input("The stack is still running. Press Enter to stop it. ")
    except DemoFailed as error:
        console.print(f"[red]The demo failed:[/] {error}")
        return 1
    console.print("Everything is stopped. Run [bold]vllm-batch up[/] to keep a server running.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
