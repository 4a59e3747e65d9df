"""`vllm-batch submit|watch|download|cancel`: a batch from the terminal, through the same API as everybody else."""

import secrets
from pathlib import Path
from typing import Annotated, Any, cast

import openai
import typer
from openai.types import Batch

from vllm_batch_dagster.cli.api_client import open_client
from vllm_batch_dagster.cli.console import fail
from vllm_batch_dagster.cli.progress import follow_batch
from vllm_batch_dagster.core.errors import InvalidInput, StateConflict
from vllm_batch_dagster.settings import load_settings

SHOWN_ERRORS = 10
COPY_BYTES = 1 << 20
INTERRUPTED = 130  # 128 + SIGINT, as shells say it

BatchArgument = Annotated[str, typer.Argument(metavar="BATCH", help="Batch id, batch_...")]


def submit(
    file: Annotated[Path, typer.Argument(help="JSONL file, one request per line.", exists=True, dir_okay=False)],
    endpoint: Annotated[str, typer.Option(help="Endpoint of every line.")] = "/v1/chat/completions",
    window: Annotated[str, typer.Option(help="Completion window.")] = "24h",
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be given many times.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show progress until it is finished.")] = False,
) -> None:
    """Upload FILE and create a batch of it; prints the batch id."""
    pairs = parse_metadata(metadata or [])
    with open_client(load_settings()) as client:
        # The client sends a call again when it gets no answer: the key keeps that from making two of anything.
        once = {"Idempotency-Key": secrets.token_hex(16)}
        uploaded = client.files.create(file=file, purpose="batch", extra_headers=once)
        batch = client.batches.create(
            input_file_id=uploaded.id,
            # The client's types list OpenAI's own endpoints and window; the server decides.
            endpoint=cast(Any, endpoint),
            completion_window=cast(Any, window),
            metadata=pairs or openai.omit,
            extra_headers=once,
        )
        typer.echo(batch.id)
        if watch:
            raise typer.Exit(watch_batch(client, batch.id))


def watch(batch: BatchArgument) -> None:
    """Show the progress of a batch until it is finished. Exit code 0 when it completed, else 1."""
    with open_client(load_settings()) as client:
        raise typer.Exit(watch_batch(client, batch))


def download(
    batch: BatchArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path(),
) -> None:
    """Write the output file and the error file of a finished batch to a folder; prints their paths."""
    with open_client(load_settings()) as client:
        found = client.batches.retrieve(batch)
        files = {"output": found.output_file_id, "errors": found.error_file_id}
        if not any(files.values()):
            raise StateConflict(f"{batch} is {found.status} and has no output: `vllm-batch watch {batch}`")
        output.mkdir(parents=True, exist_ok=True)
        for kind, file_id in files.items():
            if file_id:
                typer.echo(fetch_file(client, file_id, output / f"{batch}_{kind}.jsonl"))


def cancel(batch: BatchArgument) -> None:
    """Cancel a batch. Answers that it already has are kept."""
    with open_client(load_settings()) as client:
        typer.echo(f"{batch} is {client.batches.cancel(batch).status}")


def parse_metadata(pairs: list[str]) -> dict[str, str]:
    """Return the pairs of KEY=VALUE. Raises InvalidInput for a pair without `=`."""
    parsed = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InvalidInput(f"--metadata {pair!r} is not KEY=VALUE: write for instance --metadata team=search")
        parsed[key] = value
    return parsed


def fetch_file(client: openai.OpenAI, file_id: str, target: Path) -> Path:
    """Stream a file of the API to `target`, which appears only when it is whole."""
    partial = target.with_name(f".{target.name}.partial")
    with client.files.with_streaming_response.content(file_id) as response, partial.open("wb") as file:
        for block in response.iter_bytes(COPY_BYTES):
            file.write(block)
    return partial.replace(target)


def watch_batch(client: openai.OpenAI, batch_id: str) -> int:
    """Show the progress of a batch until it is finished. Returns the exit code."""
    try:
        batch = follow_batch(client, batch_id)
    except KeyboardInterrupt:
        typer.echo(f"The batch goes on. See it again with `vllm-batch watch {batch_id}`.", err=True)
        return INTERRUPTED
    return _conclude(batch)


def _conclude(batch: Batch) -> int:
    if batch.status == "completed":
        typer.echo(f"Get the answers with `vllm-batch download {batch.id}`.")
        return 0
    return fail(describe_end(batch))


def describe_end(batch: Batch) -> str:
    """Return how a batch ended that did not complete, with its first errors."""
    errors = (batch.errors.data if batch.errors else None) or []
    lines = [f"\n    line {error.line or '-'}: {error.message}" for error in errors[:SHOWN_ERRORS]]
    more = f"\n    and {len(errors) - SHOWN_ERRORS} more" if len(errors) > SHOWN_ERRORS else ""
    return f"{batch.id} is {batch.status}{':' if lines else ''}{''.join(lines)}{more}"
