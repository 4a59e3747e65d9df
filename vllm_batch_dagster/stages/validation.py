"""Checks every line of an input file, writes its byte index and plans its chunks. No engine is touched.

Called by the `validated_input` asset. One pass over the file (stages/inspection.py), a second over the index only when
ids may repeat.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from vllm_batch_dagster.core.chunking import ModelGroup, model_groups, plan_chunks
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.histogram import Buckets
from vllm_batch_dagster.core.lines import LineChecker
from vllm_batch_dagster.core.models import Batch, Chunk, ChunkRange, LineError, RequestCounts
from vllm_batch_dagster.core.modes import ValidationMode, choose_mode
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore, ModelCatalog, Workspace
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.failpoints import failpoint
from vllm_batch_dagster.stages.inspection import Findings, Inspection, StrictInspection, all_entries
from vllm_batch_dagster.stages.leniency import LenientInspection
from vllm_batch_dagster.stages.publication import publish
from vllm_batch_dagster.stages.quotas import refuse_queue

_MOST_NAMES = 1000


@dataclass(frozen=True, slots=True)
class ValidationLimits:
    """`max_requests` (of a batch) and `max_queued_lines` (of a project) 0 = no limit; `max_errors` bounds the list of
    errors, not the check. `mode` is that of batches whose metadata does not choose one."""

    chunk_size: int
    chunk_slots: int
    max_requests: int = 0
    max_errors: int = 1000
    mode: ValidationMode = ValidationMode.STRICT
    max_queued_lines: int = 0


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """What validation found. `lines` are all requests, bad ones too; `chunks` is empty when there are `errors`;
    `lengths` are estimated tokens of the good ones and `tokens` their sum. `groups` are the models in the order in
    which they run, `model` the only one. Lenient mode counts as `rejected` the bad lines beside which the others run;
    `rejections` are the first of their errors."""

    lines: int
    bytes: int
    model: str | None
    errors: tuple[LineError, ...]
    chunks: tuple[ChunkRange, ...]
    lengths: Buckets
    tokens: int = 0
    groups: tuple[ModelGroup, ...] = ()
    rejected: int = 0
    rejections: tuple[LineError, ...] = ()


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
    failpoint("validating", batch.id)
    report = inspect_input(batch, store, files, workspace, catalog, limits, clock)
    if batch.status is BatchStatus.VALIDATING:
        report = _check_queue(batch, report, store, limits)
        with suppress(StateConflict):
            _leave_validation(batch, report, store, int(clock()))
    return report


def _check_queue(
    batch: Batch, report: ValidationReport, store: BatchStore, limits: ValidationLimits
) -> ValidationReport:
    """Return the report of a batch that may join its project's queue, or one with the error that says why not."""
    lines = 0 if report.errors else report.lines - report.rejected
    refusal = refuse_queue(batch.project_id, lines, limits.max_queued_lines, store) if lines else None
    return replace(report, errors=(refusal,), chunks=()) if refusal else report


def _leave_validation(batch: Batch, report: ValidationReport, store: BatchStore, now: int) -> None:
    if report.errors:
        store.batches.advance(batch.id, BatchEvent.INVALID, now, errors=report.errors)
    else:
        failpoint("index", batch.id)
        store.chunks.plan(batch.id, report.chunks)
        failpoint("planning", batch.id)
        counts = RequestCounts(total=report.lines)
        store.batches.advance(
            batch.id, BatchEvent.PLANNED, now, counts=counts, model=report.model, rejected=report.rejected
        )


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
        record = store.files.get(batch.input_file_id, project_id=batch.project_id)
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
        index_path, planned = workspace.index_path(batch.id), store.chunks.list(batch.id)
        return _inspect(batch, source, record.bytes, index_path, catalog, limits, planned)


def _reject(code: str, message: str, param: str | None = None) -> ValidationReport:
    return ValidationReport(0, 0, None, (LineError(code, message, param, None),), (), ())


class _Unfit(Exception):
    """The index is not to be kept. Control flow inside this module only."""


def _inspect(
    batch: Batch,
    source: BinaryIO,
    size: int,
    index_path: Path,
    catalog: ModelCatalog,
    limits: ValidationLimits,
    planned: Sequence[Chunk],
) -> ValidationReport:
    inspection = _choose_inspection(batch, size, catalog, limits)
    # The index of a file with errors is not kept: it may stand in the place of one that a batch works with.
    with suppress(_Unfit), publish(index_path) as index:
        inspection.run(source, index)
        report = _conclude(inspection, size, index, limits)
        if report.errors or not _fits_plan(report, batch, planned):
            raise _Unfit
    return report


def _choose_inspection(batch: Batch, size: int, catalog: ModelCatalog, limits: ValidationLimits) -> Inspection:
    mode = choose_mode(batch.metadata, limits.mode)
    checker = LineChecker(batch.endpoint, _resolver(catalog), mode)
    with_inputs = limits.max_requests > 0
    if mode is ValidationMode.STRICT:
        return StrictInspection(checker, size, limits.max_errors, with_inputs=with_inputs)
    return LenientInspection(checker, size, limits.max_errors, with_inputs=with_inputs, max_models=limits.chunk_slots)


def _fits_plan(report: ValidationReport, batch: Batch, planned: Sequence[Chunk]) -> bool:
    """False when a batch that is past validation works with an index whose lines stand in another order: the mode of
    the server or its models may have changed since."""
    if batch.status is BatchStatus.VALIDATING or not planned:
        return True
    return (report.groups, report.rejected) == (model_groups(planned), batch.rejected)


def _conclude(inspection: Inspection, size: int, index: BinaryIO, limits: ValidationLimits) -> ValidationReport:
    found, errors = inspection.found, tuple(inspection.errors)
    if refusal := _refuse_file(found, limits.max_requests):
        return refusal
    chunks: tuple[ChunkRange, ...] = ()
    lenient = isinstance(inspection, LenientInspection)
    if (lenient and found.groups) or not errors:
        index.flush()
        with Path(index.name).open("rb") as packed:
            chunks = tuple(plan_chunks(all_entries(packed), found.groups, limits.chunk_size, limits.chunk_slots))
    return ValidationReport(
        lines=found.seen,
        bytes=size,
        model=found.groups[0].model if len(found.groups) == 1 else None,
        errors=() if chunks else errors,
        chunks=chunks,
        lengths=found.lengths.buckets(),
        tokens=found.tokens,
        groups=found.groups,
        rejected=found.rejected if chunks else 0,
        rejections=errors if chunks else (),
    )


def _refuse_file(found: Findings, most: int) -> ValidationReport | None:
    """Return the report of a file that is unusable as a whole, in either mode."""
    if not found.seen:
        message = "The input file is empty. Please ensure that the batch contains at least one request."
        return _reject("empty_file", message, "input_file_id")
    if 0 < most < found.seen:
        message = f"The file holds {found.seen} requests; at most {most} are allowed in a batch. Split the file."
        return _reject("too_many_requests", message, "input_file_id")
    if 0 < most < found.inputs:
        message = (
            f"The requests of the file hold {found.inputs} embedding inputs; at most {most} are allowed in a batch. "
            "Split the file."
        )
        return _reject("too_many_embedding_inputs", message, "input_file_id")
    return None


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
