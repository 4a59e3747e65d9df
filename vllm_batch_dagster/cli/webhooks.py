"""`vllm-batch webhooks secret`: what deliveries to the `webhook_url` of a batch's metadata are signed with.

Works on the batch store, with or without a running API. Endpoints of /v1/webhook_endpoints have secrets of their own,
which their makers were told.
"""

import secrets
import time
from typing import Annotated

import typer

from vllm_batch_dagster.cli.state_folder import make_state_folder
from vllm_batch_dagster.composition import build_store
from vllm_batch_dagster.core.keys import read_project
from vllm_batch_dagster.core.models import DEFAULT_PROJECT
from vllm_batch_dagster.core.webhooks import new_signing_secret
from vllm_batch_dagster.settings import load_settings

app = typer.Typer(help="The signing secrets of webhooks.", no_args_is_help=True)


@app.callback()
def webhooks() -> None:
    """Keep `secret` a subcommand: typer would make an only command the whole program."""


@app.command()
def secret(
    project: Annotated[str, typer.Option(help="Project whose batches name the URL.")] = DEFAULT_PROJECT,
    rotate: Annotated[bool, typer.Option("--rotate", help="Make a new one; the old one goes on for 24 hours.")] = False,
    revoke_old: Annotated[bool, typer.Option("--revoke-old", help="With --rotate: end the old one at once.")] = False,
) -> None:
    """Print the secret by which a receiver checks deliveries to `metadata.webhook_url`. It is made on first use."""
    if revoke_old and not rotate:
        raise typer.BadParameter("--revoke-old goes with --rotate")
    settings = load_settings()
    make_state_folder(settings.vllm_batch_home)
    records, new = build_store(settings).webhooks, new_signing_secret(secrets.token_bytes)
    if not rotate:
        typer.echo(records.project_secret(read_project(project), new).current)
        return
    now = int(time.time())
    made = records.rotate_project_secret(read_project(project), new, now, keep_old=not revoke_old)
    typer.echo(made.current)
    if made.old_until is not None:
        until = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(made.old_until))
        typer.echo(f"Until {until} deliveries are signed with the old secret too.", err=True)
