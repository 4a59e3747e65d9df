"""Finds the installed handlers. Built-ins come through the same entry-point group as everybody else's."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from handlers.base import ResultHandler

GROUP = "vllm_batch.handlers"


@dataclass(frozen=True, slots=True)
class BrokenHandler:
    """A handler that could not be loaded, and why. It never keeps the others from working."""

    name: str
    problem: str


def load_handlers() -> Iterator[ResultHandler | BrokenHandler]:
    """Yield every handler of the group, in order of their names."""
    for entry in sorted(entry_points(group=GROUP), key=lambda found: found.name):
        yield _load(entry)


def _load(entry: EntryPoint) -> ResultHandler | BrokenHandler:
    try:
        handler = entry.load()()
    except Exception as error:  # noqa: BLE001 - other people's code: whatever it raises is reported, not passed on
        return BrokenHandler(entry.name, f"{type(error).__name__}: {error}")
    if not isinstance(handler, ResultHandler):
        return BrokenHandler(entry.name, f"{entry.value} is not a ResultHandler")
    return handler
