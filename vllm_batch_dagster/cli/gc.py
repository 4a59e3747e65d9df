"""`vllm-batch gc`: what the scheduled job `retention` does, from the terminal; with --dry-run only its table."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vllm_batch_dagster.cli.console import fail, out, print_json
from vllm_batch_dagster.cli.state_folder import has_store
from vllm_batch_dagster.composition import build_disk, build_files, build_store, retention_rules
from vllm_batch_dagster.core.ports import Clock
from vllm_batch_dagster.core.retention import STAYS, Kind, RetentionReport, Tally
from vllm_batch_dagster.core.retention_ports import GraphHistory, NoHistory
from vllm_batch_dagster.settings import Settings, load_settings
from vllm_batch_dagster.stages.retention import Retention, RetentionPorts

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SHOWN_NAMES = 2


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    trust_store: Annotated[
        bool, typer.Option("--trust-store", help="Delete contents without a record even when most have none.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Delete expired files, the data of batches past their retention, and leftovers. Safe while batches run."""
    settings = load_settings()
    report = collect(settings, dry_run=dry_run, trust_store=trust_store)
    if as_json:
        print_json(as_data(report))
    else:
        show(report)
    if report.of(Kind.REFUSED).count:
        raise typer.Exit(fail("some files could not be removed: " + ", ".join(report.of(Kind.REFUSED).names)))


def collect(
    settings: Settings, clock: Clock = time.time, *, dry_run: bool = False, trust_store: bool = False
) -> RetentionReport:
    """Do one pass, an empty one before the first `up`. Raises StorageFailure."""
    if not has_store(settings):
        return RetentionReport(dry_run)
    with open_history(settings) as graph:
        ports = RetentionPorts(build_store(settings), build_files(settings), build_disk(settings), graph, clock)
        return Retention(ports, retention_rules(settings), dry_run=dry_run, trust_store=trust_store).run()


@contextmanager
def open_history(settings: Settings) -> Iterator[GraphHistory]:
    """Yield what Dagster keeps under DAGSTER_HOME, or nothing when it was never started there."""
    home = Path(os.environ.get("DAGSTER_HOME") or settings.dagster_home)
    if not (home / "dagster.yaml").exists():
        yield NoHistory()
        return
    # Dagster takes a second to import, and no other command should wait for it.
    from dagster import DagsterInstance

    from vllm_batch_dagster.defs.purge import DagsterHistory

    with DagsterInstance.from_config(str(home)) as instance:
        yield DagsterHistory(instance, settings.chunk_slots)


def as_data(report: RetentionReport) -> dict[str, Any]:
    """Return what `--json` prints."""
    found = {kind: tally for kind, tally in report.tallies.items() if tally.count}
    return {
        "dry_run": report.dry_run,
        "bytes_freed": report.bytes_freed,
        "removed": [_describe(kind, tally) for kind, tally in found.items() if kind not in STAYS],
        "kept": [_describe(kind, tally) for kind, tally in found.items() if kind in STAYS],
    }


def _describe(kind: Kind, tally: Tally) -> dict[str, Any]:
    return {"what": kind.value, "count": tally.count, "bytes": tally.bytes, "names": tally.names}


def show(report: RetentionReport) -> None:
    """Print the tables."""
    gone = [kind for kind in Kind if kind not in STAYS and report.of(kind).count]
    kept = [kind for kind in STAYS if report.of(kind).count]
    if gone:
        out.print(_table("would go" if report.dry_run else "went", gone, report))
        verb = "would be" if report.dry_run else "were"
        out.print(f"{describe_bytes(report.bytes_freed)} {verb} freed.")
    else:
        out.print("Nothing is due.")
    if kept:
        out.print(_table("stays, look at it", kept, report))


def _table(title: str, kinds: list[Kind], report: RetentionReport) -> Table:
    table = Table(title, "count", "size", "for instance", box=None)
    for kind in kinds:
        tally = report.of(kind)
        more = ", ..." if tally.count > _SHOWN_NAMES else ""
        names = ", ".join(tally.names[:_SHOWN_NAMES]) + more
        table.add_row(kind.value, str(tally.count), describe_bytes(tally.bytes) if tally.bytes else "", names)
    return table


def describe_bytes(count: int) -> str:
    """Return `512 B`, `1.5 MiB`."""
    size, unit = float(count), _UNITS[0]
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
