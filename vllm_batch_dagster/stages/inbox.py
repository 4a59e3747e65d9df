"""Turns dropped files into batches. In: a drop folder; out: files, batches, and a report beside each dropped file.

    inbox/ --take--> taken --file stored, batch made--> waits for validation --settle--> done/ or rejected/

Every step may be cut and done again: a drop's ids follow from its name (core/inbox.py), and it is looked up before it
is made. `ingest` moves bytes and runs as a job; `settle` only looks at batches and runs in the sensor's tick.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from vllm_batch_dagster.core.creation import FileFacts, Randomness, new_batch_id, new_file_id, read_batch_params
from vllm_batch_dagster.core.errors import BatchError, InvalidInput, NotFound
from vllm_batch_dagster.core.inbox import Verdict, drop_id, guess_endpoint, randomness_of, read_order
from vllm_batch_dagster.core.inbox_ports import Drop, DropFolder
from vllm_batch_dagster.core.inbox_report import report_accepted, report_failed, report_refused
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.core.webhook_urls import NO_HOSTS, AllowedHosts
from vllm_batch_dagster.core.windows import WindowRule
from vllm_batch_dagster.stages.intake import create_batch, receive_file

_BLOCK_BYTES = 1 << 20
_MOST_FIRST_LINE = 16 << 20
_RANDOM_BYTES = 4
_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class InboxPorts:
    """What the inbox needs from the outside world. `max_bytes` 0 means no limit."""

    folder: DropFolder
    store: BatchStore
    files: FileStore
    clock: Clock
    randomness: Randomness
    max_bytes: int = 0
    windows: WindowRule = WindowRule.OPENAI
    webhook_hosts: AllowedHosts = NO_HOSTS


@dataclass(slots=True)
class InboxTally:
    """What one pass did: ids of new batches, drops that ended, and those that could not be gone on with, with the
    reason. Only the first of each are named. `is_due`: there are files to ingest."""

    is_due: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, name: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        names = self.named.setdefault(what, [])
        if len(names) < _MOST_NAMED:
            names.append(name)

    def describe(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in self.counts.items()) or "nothing to do"


CREATED, STUCK = "batches created", "could not be read or stored"


def ingest(ports: InboxPorts, report: Callable[[str], None]) -> InboxTally:
    """Make batches of the drops that were taken before, then of every file that is whole. A drop that cannot be gone
    on with is tried again in the next pass and holds up no other."""
    tally = InboxTally()
    with ports.folder.alone() as is_alone:
        if is_alone:
            for drop in _drops(ports):
                _try(drop, lambda drop: _advance(drop, ports, tally, report), tally)
    return tally


def settle(ports: InboxPorts) -> InboxTally:
    """Finish the drops whose batch has left validation. `is_due` of the answer says that `ingest` has work."""
    tally = InboxTally()
    with ports.folder.alone() as is_alone:
        if is_alone:
            for drop in ports.folder.taken():
                _try(drop, lambda drop: _settle(drop, ports, tally), tally)
            tally.is_due = tally.is_due or next(ports.folder.waiting(), None) is not None
    return tally


def _drops(ports: InboxPorts) -> Iterator[Drop]:
    yield from ports.folder.taken()
    for name in ports.folder.waiting():
        drop = ports.folder.take(name, drop_id(name, ports.clock(), ports.randomness(_RANDOM_BYTES)))
        if drop is not None:
            yield drop


def _try(drop: Drop, work: Callable[[Drop], None], tally: InboxTally) -> None:
    try:
        work(drop)
    except BatchError as error:
        tally.note(STUCK, f"{drop.id}: {error}")


def _advance(drop: Drop, ports: InboxPorts, tally: InboxTally, report: Callable[[str], None]) -> None:
    if _find_batch(drop, ports) is not None:
        return
    try:
        batch = _make_batch(drop, ports)
    except InvalidInput as refusal:
        _finish(drop, Verdict.REJECTED, report_refused(drop.filename, refusal), tally)
        report(f"{drop.filename} was rejected: {refusal}")
    else:
        tally.note(CREATED, batch.id)
        report(f"{drop.filename} became {batch.id}")


def _settle(drop: Drop, ports: InboxPorts, tally: InboxTally) -> None:
    batch = _find_batch(drop, ports)
    if batch is None:
        tally.is_due = True  # whoever took it died before its batch was made
        return
    if batch.status is BatchStatus.VALIDATING:
        return
    if batch.status is BatchStatus.FAILED:
        _finish(drop, Verdict.REJECTED, report_failed(drop.filename, batch), tally)
    else:
        _finish(drop, Verdict.DONE, report_accepted(drop.filename, batch), tally)


def _finish(drop: Drop, verdict: Verdict, report: str, tally: InboxTally) -> None:
    drop.finish(verdict, report)
    tally.note(verdict.value, drop.id)


def _find_batch(drop: Drop, ports: InboxPorts) -> Batch | None:
    try:
        return ports.store.batches.get(new_batch_id(randomness_of(drop.id, "batch")))
    except NotFound:
        return None


def _make_batch(drop: Drop, ports: InboxPorts) -> Batch:
    """Store the file, unless it is stored, and create the batch. Raises InvalidInput before anything is stored, but
    for a file that turns out to be too large."""
    order = read_order(drop.read_order())
    file_id = new_file_id(randomness_of(drop.id, "file"))
    with drop.open() as source:
        params = order.with_file(file_id, guess_endpoint(source.readline(_MOST_FIRST_LINE)))
        read_batch_params(params, ports.windows)
        source.seek(0)
        _store_file(drop, source, file_id, order.project_id, ports)
    return create_batch(
        params,
        ports.store,
        ports.clock,
        randomness_of(drop.id, "batch"),
        project_id=order.project_id,
        windows=ports.windows,
        webhook_hosts=ports.webhook_hosts,
    )


def _store_file(drop: Drop, source: BinaryIO, file_id: str, project_id: str, ports: InboxPorts) -> None:
    try:
        ports.store.files.get(file_id)
    except NotFound:
        receive_file(
            iter(lambda: source.read(_BLOCK_BYTES), b""),
            FileFacts(drop.filename, "batch", project_id=project_id),
            store=ports.store,
            files=ports.files,
            clock=ports.clock,
            randomness=randomness_of(drop.id, "file"),
            max_bytes=ports.max_bytes,
        )
