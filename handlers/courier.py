"""Gives the results of ended batches to the handlers: which ones a batch has, and one attempt at one of them.

The `handler` side of stages/deliveries.py, which plans, limits the time and keeps what came of it.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import BinaryIO

from handlers.base import Delivery, Handler, Undeliverable
from handlers.registry import BrokenHandler, Found, load_handlers
from vllm_batch_dagster.core.deliveries import HANDLER, DeliveryRecord
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import FileStore, OutboxEvent
from vllm_batch_dagster.core.webhooks import Outcome
from vllm_batch_dagster.failpoints import failpoint

METADATA_KEY = "handlers"  # of a batch: which handlers get its results
NONE = "none"
MOST_ASKED = 32


class HandlerCourier:
    """See Courier (stages/deliveries.py). `allowed` are the names that may run at all, none given: every one that is
    enabled. `modules` register further handlers. Loads the handlers once."""

    kind = HANDLER

    def __init__(
        self, files: FileStore, *, limit_seconds: float, allowed: Sequence[str] = (), modules: Sequence[str] = ()
    ) -> None:
        self._files, self._allowed, self._modules = files, allowed, modules
        self._limit_seconds = limit_seconds

    @property
    def limit_seconds(self) -> float:
        return self._limit_seconds

    @cached_property
    def _found(self) -> list[Found]:
        return load_handlers(self._modules)

    def found(self) -> Sequence[tuple[Found, str | None]]:
        """Return each handler and why it would get nothing now, None when it works."""
        return [(each, self._unusable(each)) for each in self._found]

    def unused(self) -> dict[str, str]:
        """Return the handlers that would get nothing now, and why."""
        return {_name(each): reason for each, reason in self.found() if reason is not None}

    def targets(self, batch: Batch, event: OutboxEvent) -> Sequence[str]:
        """Return the handlers of a batch. One that has no file has no results, so it has no handlers. A name that
        the batch or the setting asks for is a target even if nothing useful stands behind it: that is then seen."""
        if not (batch.output_file_id or batch.error_file_id):
            return ()
        usable = [_name(each) for each, reason in self.found() if reason is None]
        broken = [each.name for each in self._found if isinstance(each, BrokenHandler) and each.name in self._allowed]
        asked = (batch.metadata or {}).get(METADATA_KEY)
        names = [*usable, *broken]
        if asked is not None:
            names = [name for name in read_names(asked)[:MOST_ASKED] if name != NONE]
        return [f"{HANDLER}:{name}" for name in dict.fromkeys(names)]

    def attempt(self, delivery: DeliveryRecord, batch: Batch, event: OutboxEvent) -> Outcome:
        handler = self._find(delivery.name)
        if isinstance(handler, Outcome):
            return handler
        try:
            for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
                self._files.open(file_id).close()
        except NotFound as error:
            return Outcome(False, reason=f"the results of {batch.id} are gone: {error}", is_final=True)
        failpoint("handlers", batch.id)
        try:
            handler.deliver(self._parcel(delivery, batch))
        except Undeliverable as error:
            return Outcome(False, reason=str(error), is_final=True)
        return Outcome(True)

    def _parcel(self, delivery: DeliveryRecord, batch: Batch) -> Delivery:
        return Delivery(
            batch=batch,
            key=delivery.id,
            version=delivery.version,
            attempt=delivery.attempts,
            open_output=partial(self._open, batch.output_file_id),
            open_errors=partial(self._open, batch.error_file_id),
        )

    def _open(self, file_id: str | None) -> BinaryIO | None:
        return self._files.open(file_id) if file_id else None

    def _find(self, name: str) -> Handler | Outcome:
        """Return the handler, or why there is none. A broken one may be mended within the hours of the attempts."""
        for each, reason in self.found():
            if _name(each) == name:
                if isinstance(each, Handler) and reason is None:
                    return each
                return Outcome(False, reason=f"{name} is {reason}", is_final=isinstance(each, Handler))
        known = ", ".join(sorted(map(_name, self._found))) or "none"
        return Outcome(False, reason=f"no handler has the name {name!r}; installed: {known}", is_final=True)

    def _unusable(self, each: Found) -> str | None:
        """Return why a handler gets nothing, None when it works."""
        if isinstance(each, BrokenHandler):
            return f"broken: {each.problem}"
        if self._allowed and each.name() not in self._allowed:
            return "off: HANDLERS does not name it"
        try:
            return None if each.enabled() else "off"
        except Exception as error:  # noqa: BLE001 - a plug-in's error is its own; the others go on
            return f"broken: enabled() raised {type(error).__name__}: {error}"


def read_names(text: str) -> list[str]:
    """Return the names of a comma-separated list."""
    return [name for part in text.split(",") if (name := part.strip())]


def _name(each: Found) -> str:
    return each.name() if isinstance(each, Handler) else each.name
