"""`vllm-batch status`: what runs on this state folder, whether it is well, and which batches are open."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table

from vllm_batch_dagster.adapters.engine import AS_CONFIGURED, EngineStatus, engine_status
from vllm_batch_dagster.cli.addresses import listening_addresses
from vllm_batch_dagster.cli.console import fail, out, print_json
from vllm_batch_dagster.cli.readiness import HEARTBEAT_SECONDS
from vllm_batch_dagster.cli.services import Service, stack_services
from vllm_batch_dagster.cli.state_folder import ServiceRecord, StackRecord, has_store, read_record
from vllm_batch_dagster.composition import build_pauses, build_store
from vllm_batch_dagster.core.errors import BatchError
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.pauses import Pause
from vllm_batch_dagster.settings import Settings, load_settings

NOT_WELL = 3  # as `systemctl status` says it
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """One service. `memory_bytes`: resident, with its children, shared pages counted once for each."""

    name: str
    pid: int
    port: int | None
    health: str
    uptime_seconds: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything that `status` shows. `complaint`: why the open batches could not be read."""

    home: Path
    record: StackRecord | None
    processes: Sequence[ProcessStatus]
    engine: EngineStatus | None
    batches: Sequence[Batch] = ()
    complaint: str = ""
    pauses: Sequence[Pause] = ()

    @property
    def is_well(self) -> bool:
        is_ready = self.record is not None and self.record.is_ready
        return is_ready and not self.complaint and all(process.health == "ok" for process in self.processes)


def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show processes, engine and open batches. Exit code 3 when the stack does not run or is not well."""
    overview = look(load_settings())
    if as_json:
        print_json(as_data(overview))
    else:
        show(overview)
    raise typer.Exit(0 if overview.is_well else NOT_WELL)


def look(settings: Settings) -> Overview:
    """Ask the processes, the engine and the store."""
    record = read_record(settings.vllm_batch_home)
    overview = Overview(
        home=settings.vllm_batch_home,
        record=record,
        processes=describe_processes(settings, record),
        engine=engine_status(settings.engine_folder),
    )
    try:
        return replace(overview, batches=open_batches(settings), pauses=standing_pauses(settings))
    except BatchError as error:
        return replace(overview, complaint=str(error))


def describe_processes(settings: Settings, record: StackRecord | None) -> list[ProcessStatus]:
    """Return the started services in start order; empty when no `up` runs."""
    if record is None:
        return []
    services = {service.name: service for service in stack_services(settings)}
    ports = {address.service: address.port for address in listening_addresses(settings)}
    return [_describe(services[r.name], r, ports.get(r.name)) for r in record.services]


def _describe(service: Service, record: ServiceRecord, port: int | None) -> ProcessStatus:
    is_well = service.is_ready(time.time() - HEARTBEAT_SECONDS)
    return ProcessStatus(
        name=service.name,
        pid=record.pid,
        port=port,
        health="ok" if is_well else "not answering",
        uptime_seconds=int(time.time() - record.started_at),
        memory_bytes=_memory(record.pid),
    )


def _memory(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        return sum(_resident(member) for member in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def open_batches(settings: Settings) -> list[Batch]:
    """Return the batches that are not finished, oldest first; empty before the first `up`. Raises StorageFailure."""
    if not has_store(settings):
        return []
    return [batch for batch in build_store(settings).batches.open() if not batch.is_terminal]


def standing_pauses(settings: Settings) -> Sequence[Pause]:
    """Return the pauses that hold now; none before the first `up`. Raises StorageFailure."""
    if not has_store(settings):
        return ()
    return build_pauses(settings, build_store(settings), time.time).standing()


def as_data(overview: Overview) -> dict[str, Any]:
    """Return what `--json` prints."""
    record, engine = overview.record, overview.engine
    return {
        "home": str(overview.home),
        "pid": record.pid if record else None,
        "ready": bool(record and record.is_ready),
        "well": overview.is_well,
        "complaint": overview.complaint or None,
        "processes": [asdict(process) for process in overview.processes],
        "engine": _engine_data(engine) if engine else None,
        "batches": [_batch_data(batch) for batch in overview.batches],
        "pauses": [asdict(pause) for pause in overview.pauses],
    }


def _engine_data(engine: EngineStatus) -> dict[str, Any]:
    return {
        "model": engine.model,
        "state": engine.state,
        "pid": engine.pid,
        "url": engine.url,
        "in_use": engine.in_use,
        "uptime_seconds": int(time.time() - engine.started_at),
        "log": str(engine.log),
        "memory": engine.rung,
        "max_num_seqs": engine.max_num_seqs,
        "max_model_len": engine.max_model_len or None,
    }


def _batch_data(batch: Batch) -> dict[str, Any]:
    counts = batch.counts
    return {
        "id": batch.id,
        "status": batch.status.value,
        "model": batch.model,
        "total": counts.total,
        "completed": counts.completed,
        "failed": counts.failed,
    }


def show(overview: Overview) -> None:
    """Print the tables."""
    if overview.record is None:
        out.print(f"Nothing runs on {overview.home}. Start it with `vllm-batch up`.")
    else:
        out.print(_process_table(overview.processes, overview.engine))
    if overview.batches:
        out.print(_batch_table(overview.batches))
    for pause in overview.pauses:
        out.print(f"{pause.scope} {pause.describe()}", markup=False)
    if overview.complaint:
        fail(overview.complaint)


def _process_table(processes: Sequence[ProcessStatus], engine: EngineStatus | None) -> Table:
    table = Table("process", "pid", "port", "health", "uptime", "memory", box=None)
    for process in processes:
        table.add_row(
            process.name,
            str(process.pid),
            str(process.port or ""),
            process.health,
            describe_duration(process.uptime_seconds),
            f"{process.memory_bytes // MIB} MB",
        )
    if engine:
        table.add_row(*_engine_row(engine))
        if engine.rung != AS_CONFIGURED:
            table.add_row("", "", "", f"memory is short: {engine.rung}", "", "")
    else:
        table.add_row("engine", "", "", "not running", "", "")
    return table


def _engine_row(engine: EngineStatus) -> tuple[str, ...]:
    return (
        f"engine {engine.model}",
        str(engine.pid),
        engine.url.rpartition(":")[2],
        f"{engine.state}, {'in use' if engine.in_use else 'idle'}",
        describe_duration(int(time.time() - engine.started_at)),
        f"{_memory(engine.pid) // MIB} MB",
    )


def _batch_table(batches: Sequence[Batch]) -> Table:
    table = Table("open batch", "status", "completed", "failed", "total", box=None)
    for batch in batches:
        counts = batch.counts
        table.add_row(batch.id, batch.status.value, str(counts.completed), str(counts.failed), str(counts.total))
    return table


def describe_duration(seconds: int) -> str:
    """Return `1h 02m`, `3m 04s` or `5s`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
