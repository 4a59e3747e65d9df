"""`vllm-batch deliveries list|replay`: what came of the webhooks and result handlers of ended batches.

Works on the batch store, with or without a running stack. A replay only makes deliveries due: the sensor of a running
stack asks for the run that makes the attempts.
"""

import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vllm_batch_dagster.cli.console import out, print_json
from vllm_batch_dagster.cli.state_folder import make_state_folder
from vllm_batch_dagster.composition import build_store
from vllm_batch_dagster.core.deliveries import DeliveryRecord, DeliveryState
from vllm_batch_dagster.core.errors import InvalidInput, NotFound
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.settings import load_settings
from vllm_batch_dagster.stages.deliveries import replay as replay_one

app = typer.Typer(help="Show and repeat what was delivered of ended batches.", no_args_is_help=True)

_UNDELIVERED = (DeliveryState.PENDING, DeliveryState.DEAD)
_SHOWN_ERROR = 60
_COLOURS = {DeliveryState.PENDING: "yellow", DeliveryState.DELIVERED: "green", DeliveryState.DEAD: "red"}


@app.command("list")
def list_deliveries(
    batch: Annotated[str, typer.Option(help="Only those of this batch, delivered ones too.")] = "",
    project: Annotated[str, typer.Option(help="Only those of this project.")] = "",
    show_all: Annotated[bool, typer.Option("--all", help="Delivered ones too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest first.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the deliveries that are waiting for their next attempt or dead."""
    store = _open_store()
    states = () if show_all else _UNDELIVERED
    found = store.deliveries.list(limit=limit, states=states, project_id=project or None)
    if batch:
        found = _of_batch(store, batch, project)[:limit]
    if as_json:
        print_json([describe_delivery(delivery) for delivery in found])
    else:
        _show(found)


@app.command()
def replay(
    delivery: Annotated[str, typer.Argument(metavar="DELIVERY_OR_BATCH", help="Delivery dlv_..., or batch_...")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let one delivery be attempted again, whatever its state, or all dead ones of a batch. They keep their ids."""
    store = _open_store()
    if delivery.startswith("batch_"):
        wanted = [each for each in _of_batch(store, delivery) if each.state is DeliveryState.DEAD]
    else:
        wanted = [_find(store, delivery)]
    again = [replay_one(each, store, time.time) for each in wanted]
    if as_json:
        print_json([describe_delivery(each) for each in again])
        return
    for each in again:
        typer.echo(f"{each.id} to {each.target} is due now")
    if not again:
        typer.echo(f"no delivery of {delivery} is dead: `vllm-batch deliveries list --batch {delivery}` shows all")


def describe_delivery(delivery: DeliveryRecord) -> dict[str, str | int | None]:
    """Return what is shown of a delivery. Times in UTC; the next attempt only of one that is pending."""
    is_pending = delivery.state is DeliveryState.PENDING
    return {
        "id": delivery.id,
        "batch": delivery.batch_id,
        "target": delivery.target,
        "state": delivery.state.value,
        "attempts": delivery.attempts,
        "next_attempt": _show_time(delivery.next_attempt_at) if is_pending else None,
        "delivered": _show_time(delivery.delivered_at),
        "last_error": delivery.last_error,
        "project": delivery.project_id,
        "results_version": delivery.version,
    }


def _show(found: Sequence[DeliveryRecord]) -> None:
    table = Table("id", "batch", "target", "state", "attempts", "next attempt", "delivered", "last error", box=None)
    for delivery in found:
        *cells, error, _project, _version = describe_delivery(delivery).values()
        cells[3] = f"[{_COLOURS[delivery.state]}]{delivery.state.value}[/]"
        shown = str(error or "-").replace("\n", " ")
        cut = shown if len(shown) <= _SHOWN_ERROR else shown[: _SHOWN_ERROR - 1] + "…"
        table.add_row(*(str(cell) if cell is not None else "-" for cell in cells), escape(cut))
    out.print(table)


def _of_batch(store: BatchStore, batch_id: str, project: str = "") -> Sequence[DeliveryRecord]:
    try:
        store.batches.get(batch_id, project_id=project or None)
    except NotFound as missing:
        raise InvalidInput(f"there is no batch {batch_id}") from missing
    return store.deliveries.of_batch(batch_id)


def _find(store: BatchStore, delivery_id: str) -> DeliveryRecord:
    try:
        return store.deliveries.get(delivery_id)
    except NotFound as missing:
        raise InvalidInput(
            f"there is no delivery {delivery_id}: `vllm-batch deliveries list --all` shows their ids"
        ) from missing


def _show_time(seconds: int | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _open_store() -> BatchStore:
    settings = load_settings()
    make_state_folder(settings.vllm_batch_home)
    return build_store(settings)
