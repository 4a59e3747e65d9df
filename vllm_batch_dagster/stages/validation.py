"""Checks every line of an input file, writes its byte index and plans its chunks. No engine is touched.

Called by the `validated_input` asset. One pass over the file, a second over the index only when ids may repeat.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vllm_batch_dagster.core.byteindex import (
    IndexEntry,
    estimate_tokens,
    pack_entry,
    pack_header,
    read_count,
    read_entries,
)
from vllm_batch_dagster.core.chunking import plan_chunks
from vllm_batch_dagster.core.duplicates import DuplicateFilter, repeated_lines
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.histogram import Buckets, Histogram
from vllm_batch_dagster.core.lines import (
    MAX_LINE_BYTES,
    CheckedLine,
    LineChecker,
    hash_custom_id,
    line_too_long,
    read_request,
)
from vllm_batch_dagster.core.models import Batch, ChunkRange, LineError, RequestCounts
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore, ModelCatalog, Workspace
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.stages.publication import publish

_MOST_NAMES = 1000
_DUPLICATE = (
    "The custom_id for this request is a duplicate of another request. "
    "The custom_id parameter must be unique for each request in a batch."
)


@dataclass(frozen=True, slots=True)
class ValidationLimits:
    """`max_requests` 0 = no limit; `max_errors` bounds the list of errors, not the check."""

    chunk_size: int
    chunk_slots: int
    max_requests: int = 0
    max_errors: int = 1000


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """What validation found. `lines` are all requests, bad ones too; `chunks` is empty when there are `errors`;
    `lengths` are estimated tokens of the good ones and `tokens` their sum."""

    lines: int
    bytes: int
    model: str | None
    errors: tuple[LineError, ...]
    chunks: tuple[ChunkRange, ...]
    lengths: Buckets
    tokens: int = 0


def validate_batch(
    batch: Batch,
    store: BatchStore,
    files: FileStore,
    workspace: Workspace,
    catalog: ModelCatalog,
    limits: ValidationLimits,
    clock: Clock,
) -> ValidationReport:
    """Validate the input of `batch` and move the batch to `in_progress` or `failed`.

    Doing it again for a batch that is past validation rewrites the same index and changes nothing else. A batch that
    was cancelled meanwhile stays so.
    """
    report = inspect_input(batch, store, files, workspace, catalog, limits, clock)
    if batch.status is BatchStatus.VALIDATING:
        with suppress(StateConflict):
            _leave_validation(batch, report, store, int(clock()))
    return report


def _leave_validation(batch: Batch, report: ValidationReport, store: BatchStore, now: int) -> None:
    if report.errors:
        store.batches.advance(batch.id, BatchEvent.INVALID, now, errors=report.errors)
    else:
        store.chunks.plan(batch.id, report.chunks)
        counts = RequestCounts(total=report.lines)
        store.batches.advance(batch.id, BatchEvent.PLANNED, now, counts=counts, model=report.model)


def inspect_input(
    batch: Batch,
    store: BatchStore,
    files: FileStore,
    workspace: Workspace,
    catalog: ModelCatalog,
    limits: ValidationLimits,
    clock: Clock,
) -> ValidationReport:
    """Check the input and write its byte index, without changing the batch."""
    try:
        record = store.files.get(batch.input_file_id)
        if record.expires_at is not None and record.expires_at <= clock():
            raise NotFound("file", record.id)
        source = files.open(record.id)
    except NotFound:
        return _reject(
            "invalid_request",
            f"Cannot find file {batch.input_file_id}, or it has expired.",
            param="file_id",
        )
    with source:
        if record.purpose != "batch":
            message = f"Input file must have purpose 'batch', but it has purpose '{record.purpose}'."
            return _reject("invalid_request", message, param="file_id")
        inspection = _Inspection(batch, record.bytes, limits, catalog)
        return inspection.run(source, workspace.index_path(batch.id))


def _reject(code: str, message: str, param: str | None = None) -> ValidationReport:
    return ValidationReport(0, 0, None, (LineError(code, message, param, None),), (), ())


class _Unfit(Exception):
    """The file has errors. Control flow inside this module only."""


class _Inspection:
    """One pass over one input file."""

    def __init__(self, batch: Batch, size: int, limits: ValidationLimits, catalog: ModelCatalog) -> None:
        self._limits, self._size = limits, size
        self._checker = LineChecker(batch.endpoint, _resolver(catalog))
        self._duplicates = DuplicateFilter(size)
        self._lengths = Histogram()
        self._errors: list[LineError] = []
        self._seen = self._lines = self._tokens = 0

    def run(self, source: BinaryIO, index_path: Path) -> ValidationReport:
        # The index of a file with errors is not kept: it may stand in the place of one that a batch works with.
        with suppress(_Unfit), publish(index_path) as index:
            self._write_index(index, source)
            with Path(index.name).open("rb") as packed:
                self._find_duplicates(packed, source)
                report = self._conclude(packed)
            if report.errors:
                raise _Unfit
        return report

    def _write_index(self, index: BinaryIO, source: BinaryIO) -> None:
        # The line count is known only at the end, so the header is written twice.
        index.write(pack_header(0))
        for entry in self._entries(source):
            index.write(pack_entry(entry))
        index.seek(0)
        index.write(pack_header(self._lines))
        index.flush()

    def _entries(self, source: BinaryIO) -> Iterator[IndexEntry]:
        """Yield an entry for every good line; collect the errors of the others."""
        for number, offset, raw in _numbered_lines(source):
            self._seen += 1
            if raw is None:
                self._note(line_too_long(number))
                continue
            checked = self._checker.check(raw, number)
            if not isinstance(checked, CheckedLine):
                self._note(*checked)
                continue
            id_hash, tokens = hash_custom_id(checked.custom_id), estimate_tokens(checked.body)
            self._duplicates.add(id_hash)
            self._lengths.add(tokens)
            self._tokens += tokens
            self._lines += 1
            yield IndexEntry(offset, len(raw), id_hash, tokens)

    def _note(self, *errors: LineError) -> None:
        self._errors.extend(errors[: max(0, self._limits.max_errors - len(self._errors))])

    def _find_duplicates(self, packed: BinaryIO, source: BinaryIO) -> None:
        """Settle the suspects of the filter: repeated hashes by position, then by the ids themselves."""
        if not self._duplicates.suspects:
            return
        entries = read_entries(packed, 0, read_count(packed))
        repeats = set(repeated_lines((entry.id_hash for entry in entries), self._duplicates.suspects))
        if not repeats:
            return
        hashes = {entry.id_hash for line, entry in enumerate(self._all(packed)) if line in repeats}
        seen: set[str] = set()
        numbers = _line_numbers(source)
        for entry in self._all(packed):
            if entry.id_hash in hashes:
                source.seek(entry.offset)
                custom_id, _body = read_request(source.read(entry.length))
                if len(self._errors) >= 2 * self._limits.max_errors:
                    return
                if custom_id in seen:
                    number = numbers(entry.offset)
                    self._errors.append(LineError("duplicate_custom_id", _DUPLICATE, "custom_id", number))
                seen.add(custom_id)

    @staticmethod
    def _all(packed: BinaryIO) -> Iterator[IndexEntry]:
        return read_entries(packed, 0, read_count(packed))

    def _conclude(self, packed: BinaryIO) -> ValidationReport:
        if not self._lines and not self._errors:
            message = "The input file is empty. Please ensure that the batch contains at least one request."
            return _reject("empty_file", message, "input_file_id")
        most = self._limits.max_requests
        if most and self._lines > most:
            message = f"The file holds {self._lines} requests; at most {most} are allowed in a batch. Split the file."
            return _reject("too_many_requests", message, "input_file_id")
        errors = tuple(sorted(self._errors, key=lambda error: error.line or 0)[: self._limits.max_errors])
        chunks: tuple[ChunkRange, ...] = ()
        if not errors:
            limits = self._limits
            planned = plan_chunks(self._all(packed), self._lines, limits.chunk_size, limits.chunk_slots)
            chunks = tuple(planned)
        lengths = self._lengths.buckets()
        return ValidationReport(self._seen, self._size, self._checker.model, errors, chunks, lengths, self._tokens)


def _resolver(catalog: ModelCatalog) -> Callable[[str], str | None]:
    """Return a look-up of canonical model names that asks the catalogue once per name."""
    known: dict[str, str | None] = {}

    def resolve(name: str) -> str | None:
        if name in known:
            return known[name]
        model = catalog.find(name)
        found = model.name if model else None
        if len(known) < _MOST_NAMES:  # a file may hold a different wrong name on every line
            known[name] = found
        return found

    return resolve


def _numbered_lines(source: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (1-based number, offset, bytes without the line's end) of the lines that are not blank.

    None stands for the bytes of a line over the limit: it is passed over in pieces and never held whole.
    """
    source.seek(0)
    offset = number = 0
    longest = MAX_LINE_BYTES + len(b"\r\n")
    while piece := source.readline(longest):
        number += 1
        length, raw = len(piece), piece.rstrip(b"\r\n")
        if length == longest and not piece.endswith(b"\n"):
            length += _skip_line(source)
            yield number, offset, None
        elif len(raw) > MAX_LINE_BYTES:
            yield number, offset, None
        elif raw.strip():
            yield number, offset, raw
        offset += length


def _skip_line(source: BinaryIO) -> int:
    """Read on to the end of the line. Returns how many bytes that were."""
    skipped = 0
    while piece := source.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _line_numbers(source: BinaryIO) -> Callable[[int], int]:
    """Return a function from ascending offsets to line numbers. It reads the file at most once, and only when asked."""
    state = {"offset": 0, "number": 1}

    def number_of(offset: int) -> int:
        source.seek(state["offset"])
        left = offset - state["offset"]
        while left > 0:
            block = source.read(min(left, 1 << 20))
            state["number"] += block.count(b"\n")
            left -= len(block)
        state["offset"] = offset
        return state["number"]

    return number_of
