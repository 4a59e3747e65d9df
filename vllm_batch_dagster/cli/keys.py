"""`vllm-batch keys create|list|revoke`: who may call the API. Works on the batch store, with or without a running API.

A running API sees a change within a second.
"""

import secrets
import time
from typing import Annotated

import typer
from rich.table import Table

from vllm_batch_dagster.cli.console import out, print_json
from vllm_batch_dagster.cli.state_folder import make_state_folder
from vllm_batch_dagster.composition import build_store
from vllm_batch_dagster.core.errors import InvalidInput, NotFound
from vllm_batch_dagster.core.keys import Key, make_key, new_secret
from vllm_batch_dagster.core.models import DEFAULT_PROJECT
from vllm_batch_dagster.core.ports import KeyRecords
from vllm_batch_dagster.settings import load_settings

app = typer.Typer(help="Make, list and revoke the keys of the API.", no_args_is_help=True)


@app.command()
def create(
    project: Annotated[str, typer.Option(help="Project that owns what is made with the key.")] = DEFAULT_PROJECT,
    label: Annotated[str, typer.Option(help="What the key is for.")] = "",
) -> None:
    """Make a key and print it: it is shown this once."""
    secret = new_secret(secrets.token_bytes)
    key = make_key(secret, project, label, secrets.token_bytes, int(time.time()))
    records = _open_records()
    is_first = not records.list()
    records.add(key)
    typer.echo(secret)
    typer.echo(f"{key.id} of project '{key.project_id}'. The key is not shown again: keep it now.", err=True)
    if is_first:
        typer.echo("It is the first: from now on every request to /v1 needs a key.", err=True)


@app.command("list")
def list_keys(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the keys, revoked ones too. The keys themselves are not stored."""
    keys = _open_records().list()
    if as_json:
        print_json([describe_key(key) for key in keys])
        return
    table = Table("id", "project", "label", "created", "last used", "revoked", box=None, pad_edge=False)
    for key in keys:
        table.add_row(*(str(value or "-") for value in describe_key(key).values()))
    out.print(table)


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="KEY", help="Key id, key_...")]) -> None:
    """Revoke a key for good. Its project keeps its files and batches."""
    records = _open_records()
    try:
        key = records.revoke(key_id, int(time.time()))
    except NotFound as missing:
        raise InvalidInput(f"there is no key {key_id}: `vllm-batch keys list` shows their ids") from missing
    typer.echo(f"{key.id} of project '{key.project_id}' is revoked")
    if not any(other.is_live for other in records.list()):
        typer.echo("No key is left, and the API stays closed: make one with `vllm-batch keys create`.", err=True)


def describe_key(key: Key) -> dict[str, str | None]:
    """Return what is shown of a key. Times in UTC; the last use to the hour."""
    return {
        "id": key.id,
        "project": key.project_id,
        "label": key.label,
        "created": _show_time(key.created_at),
        "last_used": _show_time(key.last_used_at),
        "revoked": _show_time(key.revoked_at),
    }


def _show_time(seconds: int | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(seconds))


def _open_records() -> KeyRecords:
    settings = load_settings()
    make_state_folder(settings.vllm_batch_home)
    return build_store(settings).keys
