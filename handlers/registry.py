"""Finds the installed handlers: by entry point, as the built-ins are, in HANDLER_MODULES, or registered by a call.

Used by the courier (courier.py) in the process of each run, and by `vllm-batch doctor`. One that cannot be loaded is
reported and keeps nobody else from working.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from handlers.base import Handler

GROUP = "vllm_batch.handlers"

_registered: list[Handler] = []


@dataclass(frozen=True, slots=True)
class BrokenHandler:
    """A handler that could not be loaded, and why. It never keeps the others from working."""

    name: str
    problem: str


Found = Handler | BrokenHandler


def register_handler(handler: Handler) -> None:
    """Make an instance known to this process. One of the same name that was registered before is replaced.

    The module that calls it must be imported by every run: name it in HANDLER_MODULES or in the entry-point group.
    """
    if not isinstance(handler, Handler):
        raise TypeError(f"{handler!r} is no instance of a subclass of ResultHandler or Handler")
    _registered[:] = [known for known in _registered if known.name() != handler.name()] + [handler]


def load_handlers(modules: Sequence[str] = ()) -> list[Found]:
    """Return every handler: those of the entry-point group in order of their names, then those that `modules` (names,
    or paths of .py files) and entry points registered by a call. A second one of a name is broken.
    """
    found: list[Found] = []
    for entry in sorted(entry_points(group=GROUP), key=lambda each: each.name):
        found.extend(_load_entry(entry))
    for module in modules:
        found.extend(_load_module(module))
    return list(_each_name_once([*found, *_registered]))


def _load_entry(entry: EntryPoint) -> Iterator[Found]:
    """Yield what an entry point names: a class, an instance, or a module that registers its handlers when imported."""
    try:
        loaded: Any = entry.load()
        handler = loaded() if isinstance(loaded, type) else loaded
        if isinstance(handler, Handler):
            handler.name()  # what it raises shows here that it is broken, and not in the middle of a batch
    except BaseException as error:  # noqa: BLE001 - other people's code: whatever it raises is reported, not passed on
        yield BrokenHandler(entry.name, _told(error))
        return
    if isinstance(handler, Handler):
        yield handler
    elif not isinstance(handler, ModuleType):
        yield BrokenHandler(entry.name, f"{entry.value} is not a ResultHandler or Handler")


def _load_module(name: str) -> Iterator[BrokenHandler]:
    """Import a module for the handlers that it registers."""
    try:
        _import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except BaseException as error:  # noqa: BLE001 - as above
        yield BrokenHandler(name, _told(error))


def _import_file(path: Path) -> None:
    """Import a file once in this process, under a name that no package has."""
    name = f"handler_file_{path.expanduser().absolute().as_posix().replace('/', '_').removesuffix('.py')}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path.expanduser())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _each_name_once(found: Sequence[Found]) -> Iterator[Found]:
    names: set[str] = set()
    for each in found:
        name = each.name() if isinstance(each, Handler) else each.name
        if isinstance(each, Handler) and name in names:
            yield BrokenHandler(name, f"another handler has the name {name!r}: {type(each).__qualname__} is not used")
        else:
            names.add(name)
            yield each


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
