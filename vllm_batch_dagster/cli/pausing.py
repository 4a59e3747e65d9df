"""`vllm-batch pause` and `vllm-batch resume`: no new line is sent for a while.

Works on the batch store, with or without a running stack; a running one sees a change within seconds.
"""

import time
from collections.abc import Sequence
from typing import Annotated

import typer

from vllm_batch_dagster.cli.state_folder import make_state_folder
from vllm_batch_dagster.composition import build_pauses, build_store
from vllm_batch_dagster.core.errors import InvalidInput, NotFound, StateConflict
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.pauses import ALL, Pause, PauseCause, find_pause
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.windows import WindowRule, window_seconds
from vllm_batch_dagster.settings import Settings, load_settings
from vllm_batch_dagster.stages.pausing import lift, models_of

BatchArgument = Annotated[str | None, typer.Argument(metavar="[BATCH]", help="Batch id, batch_...; default: all.")]


def pause(
    batch: BatchArgument = None,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the batch.")] = "an operator paused it",
    length: Annotated[str | None, typer.Option("--for", help="How long: 90m, 2h, 1d; default: until `resume`.")] = None,
) -> None:
    """Send no new line of BATCH, or of any; what is in flight finishes. The deadline of a batch goes on."""
    seconds = _read_length(length)
    store = _open_store(load_settings())
    found = _find_open(store, batch) if batch else None
    now = int(time.time())
    made = Pause(found.id if found else ALL, PauseCause.OPERATOR, reason, now, now + seconds if seconds else None)
    store.pauses.put(made)
    typer.echo(f"{_name(found)}: {made.describe()}")


def resume(batch: BatchArgument = None) -> None:
    """End the pause of BATCH, or that of all; a breaker that is open is tried at once."""
    settings = load_settings()
    store = _open_store(settings)
    found = _find_open(store, batch) if batch else None
    models = models_of(found, store.chunks.list(found.id)) if found else ()
    for ended in lift(store.pauses, found, models):
        typer.echo(f"ended: {ended.scope} {ended.describe()}")
    for left in _still_standing(settings, store, found, models):
        typer.echo(f"still {left.scope} {left.describe()}")


def _still_standing(settings: Settings, store: BatchStore, batch: Batch | None, models: Sequence[str]) -> list[Pause]:
    """Return what keeps the batch, or everything, from going on."""
    standing = build_pauses(settings, store, time.time).standing()
    if batch is None:
        return [pause for pause in standing if pause.scope == ALL]
    found = (find_pause(standing, batch.id, model, time.time()) for model in models or (batch.model,))
    return [pause for pause in dict.fromkeys(found) if pause is not None]


def _read_length(text: str | None) -> int | None:
    if text is None:
        return None
    seconds = window_seconds(text, WindowRule.ANY)
    if seconds is None:
        raise InvalidInput(f"--for {text} is no length of time: write a number and m, h or d, from 1m to 30d")
    return seconds


def _find_open(store: BatchStore, batch_id: str) -> Batch:
    try:
        batch = store.batches.get(batch_id)
    except NotFound as missing:
        raise InvalidInput(f"there is no batch {batch_id}: `vllm-batch status` lists the open ones") from missing
    if batch.is_terminal:
        raise StateConflict(f"{batch_id} is {batch.status.value}: there is nothing to pause or to resume")
    return batch


def _name(batch: Batch | None) -> str:
    return batch.id if batch else "every batch"


def _open_store(settings: Settings) -> BatchStore:
    make_state_folder(settings.vllm_batch_home)
    return build_store(settings)
