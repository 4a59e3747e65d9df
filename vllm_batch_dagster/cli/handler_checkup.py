"""The result handlers as `vllm-batch doctor` sees them: which are installed, off, broken, or cannot work now."""

from collections.abc import Iterator

from handlers.base import Handler
from handlers.courier import read_names
from vllm_batch_dagster.cli.checkup import Finding
from vllm_batch_dagster.composition import build_files, build_handler_courier
from vllm_batch_dagster.settings import Settings


def check_handlers(settings: Settings) -> Iterator[Finding]:
    """One finding per handler. A broken one is a warning: batches run, and the other handlers work."""
    found = build_handler_courier(settings, build_files(settings)).found()
    for each, reason in found:
        name = f"handler {each.name() if isinstance(each, Handler) else each.name}"
        if reason is None and isinstance(each, Handler):
            yield _check(name, each)
        elif (reason or "").startswith("broken"):
            yield Finding(name, "warn", str(reason), "mend or uninstall it; nothing is delivered to it")
        else:
            yield Finding(name, "ok", str(reason))
    names = {each.name() if isinstance(each, Handler) else each.name for each, _ in found}
    for missing in [name for name in read_names(settings.handlers) if name not in names]:
        yield Finding(f"handler {missing}", "warn", "HANDLERS names it, and none has this name", "install it")


def _check(name: str, handler: Handler) -> Finding:
    try:
        handler.check()
    except Exception as error:  # noqa: BLE001 - a plug-in's error is the finding
        return Finding(name, "warn", f"{type(error).__name__}: {error}", "deliveries to it will be tried again")
    return Finding(name, "ok", "on")
