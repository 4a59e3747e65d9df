"""The asset graph: validated_input -> chunk_results (a partition per chunk) -> merged_output -> curated_export.

Each asset calls one stage and shows its report. The rules are in stages and core; what is launched when is decided
by the sensors.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import dagster as dg

from vllm_batch_dagster.core.errors import NotFound, UnprovenMerge
from vllm_batch_dagster.core.models import Batch, Chunk, stop_reason
from vllm_batch_dagster.core.pauses import Pause
from vllm_batch_dagster.core.reconciling import AttemptPlan, plan_attempt
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.defs import checks
from vllm_batch_dagster.defs.background import BackgroundInference
from vllm_batch_dagster.defs.curation import curated_export
from vllm_batch_dagster.defs.deliveries import deliveries
from vllm_batch_dagster.defs.history import BATCH_TAG, CHUNK_RESULTS, read_shown_result
from vllm_batch_dagster.defs.manifest import describe_manifest
from vllm_batch_dagster.defs.metadata import (
    SAMPLES,
    describe_chunk,
    describe_empty_slot,
    describe_merge,
    describe_validation,
)
from vllm_batch_dagster.defs.partitions import batches, cell_key, chunk_cells, split_cell
from vllm_batch_dagster.defs.pauses import may_warm, show_pause
from vllm_batch_dagster.defs.preflight import describe_preflight
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.failpoints import failpoint
from vllm_batch_dagster.stages.healing import without_lost_results
from vllm_batch_dagster.stages.inference import ChunkDone, RangeInference
from vllm_batch_dagster.stages.merging import MergeReport, merge_batch
from vllm_batch_dagster.stages.rows import answered_lines
from vllm_batch_dagster.stages.validation import ValidationReport, validate_batch

ENGINE_POOL = "engine"
GROUP = "batch"


def build_assets(slots: int) -> list[dg.AssetsDefinition]:
    """Return the graph for `slots` chunk slots per batch."""
    return [validated_input(slots), chunk_results(slots), merged_output(), deliveries(), curated_export()]


def validated_input(slots: int) -> dg.AssetsDefinition:
    @dg.asset(
        name="validated_input",
        partitions_def=batches,
        group_name=GROUP,
        kinds={"jsonl"},
        check_specs=[checks.LINES_VALID],
    )
    def check_input(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> Iterator[object]:
        """Start here: every line of the input file checked, its byte index written, its chunks planned. A batch with
        a bad line ends here as failed, `errors` lists each bad line, and no engine is touched; in lenient mode bad
        lines are set aside for the error file."""
        batch = services.store.batches.get(context.partition_key)
        report = _validate(services, batch)
        failpoint("planned", batch.id)
        if not report.errors:
            _warm_engine(context, services, batch)
            # As planned, which is not as this very pass would plan it: CHUNK_SIZE may have changed since.
            _fill_unused_slots(context.instance, batch.id, len(services.store.chunks.list(batch.id)), slots)
        shown = dict(describe_validation(report, batch, services))
        if not report.errors:
            shown |= describe_preflight(batch, services)
        yield dg.MaterializeResult(metadata=shown, check_results=[checks.lines_valid(report)])

    return check_input


def _validate(services: Services, batch: Batch) -> ValidationReport:
    return validate_batch(
        batch,
        services.store,
        services.files,
        services.workspace,
        services.catalog,
        services.limits,
        services.clock,
    )


def _warm_engine(context: dg.AssetExecutionContext, services: Services, batch: Batch) -> None:
    """Let the engine start while the run for the chunks is asked for and started: it is the longest wait of all."""
    planned = services.store.batches.get(batch.id)
    if batch.status is BatchStatus.VALIDATING and planned.status is BatchStatus.IN_PROGRESS:
        first = services.store.chunks.get(batch.id, 0)
        if may_warm(context, services, planned, first):
            services.engines.warm(services.model_of(planned, first), context.log.info)


def _fill_unused_slots(instance: dg.DagsterInstance, batch_id: str, used: int, slots: int) -> None:
    """Show the slots that the batch does not need as done, so that a finished batch is a wholly green row."""
    for index in range(used, slots):
        event = dg.AssetMaterialization(
            CHUNK_RESULTS, partition=cell_key(batch_id, index), metadata=describe_empty_slot(batch_id)
        )
        instance.report_runless_asset_event(event)


def chunk_results(slots: int) -> dg.AssetsDefinition:
    cells = chunk_cells(slots)

    @dg.multi_asset(
        name="chunk_results",
        specs=[
            dg.AssetSpec(
                CHUNK_RESULTS,
                partitions_def=cells,
                deps=["validated_input"],
                skippable=True,
                group_name=GROUP,
                kinds={"vllm"},
                description="The engine's answer to every line of a chunk. One partition per chunk; a run covers a "
                "range of them. A rerun of a finished chunk asks the engine again; a retry sends only missing lines.",
            )
        ],
        check_specs=checks.chunk_check_specs(cells),
        can_subset=True,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool=ENGINE_POOL,
    )
    def infer(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> Iterator[object]:
        wanted: dict[str, list[int]] = {}
        for key in context.partition_keys:
            batch_id, index = split_cell(key)
            wanted.setdefault(batch_id, []).append(index)
        for batch_id, indexes in wanted.items():
            yield from _infer_batch(context, services, batch_id, indexes)

    return infer


def _infer_batch(
    context: dg.AssetExecutionContext, services: Services, batch_id: str, indexes: list[int]
) -> Iterator[object]:
    """Yield what each chunk of one batch has to show, as it finishes."""
    batch = services.store.batches.get(batch_id)
    if batch.status is BatchStatus.VALIDATING:
        raise NotFound("chunks of a batch that is still validating", batch_id)
    _restore_index(services, batch)
    known = without_lost_results(services.store.chunks.list(batch_id), services.workspace)
    planned = {chunk.index: chunk for chunk in known}
    for index in indexes:
        if index not in planned:
            yield dg.AssetMaterialization(
                CHUNK_RESULTS, partition=cell_key(batch_id, index), metadata=describe_empty_slot(batch_id)
            )
    chunks = [planned[index] for index in indexes if index in planned]
    plans = {chunk.index: _plan(context, chunk) for chunk in chunks}
    context.log.info(f"{batch_id}: " + ", ".join(f"{index:04d} {plan.value}" for index, plan in plans.items()))
    for chunk in chunks:
        if plans[chunk.index] is AttemptPlan.REPORT and chunk.summary is not None:
            yield from _show(context, services, batch, ChunkDone(chunk.index, chunk.published_epoch, chunk.summary))
    to_run = [chunk for chunk in chunks if plans[chunk.index] in (AttemptPlan.RESUME, AttemptPlan.REPEAT)]
    fresh = frozenset(index for index, plan in plans.items() if plan is AttemptPlan.REPEAT)
    # The chunks of a model are neighbours: the engine is swapped once for each model of a file with several.
    for _model, neighbours in groupby(to_run, key=lambda chunk: chunk.range.model):
        if not stop_reason(services.store.batches.get(batch_id), services.clock()):
            yield from _run_chunks(context, services, batch, list(neighbours), fresh)


def _restore_index(services: Services, batch: Batch) -> None:
    """Write the byte index anew when the disk has lost it: it follows from the input file alone."""
    if not services.workspace.index_path(batch.id).exists():
        _validate(services, batch)


def _plan(context: dg.AssetExecutionContext, chunk: Chunk) -> AttemptPlan:
    shown = read_shown_result(context.instance, chunk.batch_id, chunk.index, context.run)
    return plan_attempt(chunk, shown)


def _run_chunks(
    context: dg.AssetExecutionContext,
    services: Services,
    batch: Batch,
    chunks: list[Chunk],
    fresh: frozenset[int],
) -> Iterator[object]:
    model = services.model_of(batch, chunks[0])
    notes = services.origin_notes(model)
    background = BackgroundInference(
        lambda on_done, report: RangeInference(
            replace(services.inference_ports, origins=notes),
            services.inference_policy,
            batch,
            model,
            chunks,
            fresh=fresh,
            run_id=context.run.run_id,
            on_done=on_done,
            report=report,
        ),
        context.log.info,
    )
    with notes, background:
        for done in background.finished_chunks():
            yield from _show(context, services, batch, done)
    if isinstance(background.stopped, Pause):
        show_pause(context, batch, chunks[0], background.stopped)
    elif background.stopped:
        context.log.info(f"{batch.id} stops: {background.stopped.value}; finished lines are kept")


def _show(context: dg.AssetExecutionContext, services: Services, batch: Batch, done: ChunkDone) -> Iterator[object]:
    """Yield the materialization and the checks of a published chunk."""
    chunk = services.store.chunks.get(batch.id, done.index)
    yield _materialize(services, batch, chunk, done)
    yield from checks.chunk_checks(done, cell_key(batch.id, done.index))


def _materialize(services: Services, batch: Batch, chunk: Chunk, done: ChunkDone) -> dg.AssetMaterialization:
    samples = SAMPLES if services.settings.ui_samples else 0
    lines = answered_lines(batch, chunk, services.files, services.workspace, most=samples) if samples else ()
    return dg.AssetMaterialization(
        CHUNK_RESULTS,
        partition=cell_key(batch.id, done.index),
        metadata=describe_chunk(done, batch, services, lines),
        tags={"dagster/data_version": done.summary.digest},
    )


def merged_output() -> dg.AssetsDefinition:
    @dg.asset(
        name="merged_output",
        partitions_def=batches,
        deps=[CHUNK_RESULTS],
        group_name=GROUP,
        kinds={"jsonl"},
        check_specs=[checks.COUNTS_CONSERVED, checks.CUSTOM_IDS_ONCE],
    )
    def merge(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> Iterator[object]:
        """The output and the error file of a batch, in input order, every custom_id exactly once."""
        batch = services.store.batches.get(context.partition_key)
        if services.store.chunks.list(batch.id):
            _restore_index(services, batch)
        try:
            report = merge_batch(batch, services.merge_ports, run_id=context.run.run_id)
        except UnprovenMerge as error:
            yield checks.refused_merge(error)
            raise
        _show_sealed(context.instance, services, report)
        chunks = services.store.chunks.list(batch.id)
        context.log.info(f"{batch.id} is {report.batch.status.value}: {report.counts}")
        yield dg.MaterializeResult(
            metadata={**describe_merge(report, chunks, services), **describe_manifest(report.manifest, services)},
            check_results=checks.merge_checks(report),
        )

    return merge


def _show_sealed(instance: dg.DagsterInstance, services: Services, report: MergeReport) -> None:
    """Show the chunks that the merge of a stopping batch published itself: no run of theirs will."""
    for index in report.sealed:
        chunk = services.store.chunks.get(report.batch.id, index)
        if chunk.summary is not None:
            done = ChunkDone(index, chunk.published_epoch, chunk.summary)
            instance.report_runless_asset_event(_materialize(services, report.batch, chunk, done))


__all__ = ["BATCH_TAG", "ENGINE_POOL", "build_assets"]
