"""`vllm-batch retry BATCH`: a new batch of the lines of a finished one that did not succeed."""

import secrets
from typing import Annotated

import typer
from openai.types import Batch

from vllm_batch_dagster.cli.api_client import open_client
from vllm_batch_dagster.cli.batches import BatchArgument, parse_metadata, watch_batch
from vllm_batch_dagster.settings import load_settings


def retry(
    batch: BatchArgument,
    window: Annotated[str | None, typer.Option(help="Completion window; default: that of BATCH.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE; may be given many times; default: those of BATCH.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show progress until it is finished.")] = False,
) -> None:
    """Create a batch of the failed and missing lines of a finished BATCH; prints its id."""
    body: dict[str, object] = {}
    if window is not None:
        body["completion_window"] = window
    if metadata:
        body["metadata"] = parse_metadata(metadata)
    with open_client(load_settings()) as client:
        # The client sends a call again when it gets no answer: the key keeps that from making two batches.
        once = client.with_options(default_headers={"Idempotency-Key": secrets.token_hex(16)})
        made = once.post(f"/batches/{batch}/retry", body=body, cast_to=Batch)
        typer.echo(made.id)
        if watch:
            raise typer.Exit(watch_batch(client, made.id))
