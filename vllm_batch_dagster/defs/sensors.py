"""What drives the graph: one level-triggered sensor that compares batches with the graph and asks for what is missing,
and one that stops an idle engine.

The rules are in core/reconciling.py; nothing is remembered between ticks. Dagster's floor for a tick is 5 s.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

import dagster as dg

from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import Batch, Chunk, stop_reason
from vllm_batch_dagster.core.pauses import ALL, Pause, find_pause, model_of_scope
from vllm_batch_dagster.core.reconciling import Launch, Step, decide_delivery, decide_launches
from vllm_batch_dagster.defs.history import BATCH_TAG, ActiveBatches, read_active_batches, read_graph_state
from vllm_batch_dagster.defs.jobs import JOB_OF, AssetJob
from vllm_batch_dagster.defs.partitions import batches, cell_key, slot_key
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.stages.deliveries import close_untold
from vllm_batch_dagster.stages.healing import without_lost_results
from vllm_batch_dagster.stages.pausing import model_of

_BATCHES = str(batches.name)
_IDLE_CHECK_SECONDS = 30
_MOST_BATCHES_PER_TICK = 200
_MOST_PAUSES_TOLD = 5
_MOST_DELIVERIES_PER_TICK = 50


def build_sensors(jobs: Sequence[AssetJob]) -> list[dg.SensorDefinition]:
    return [_reconcile_sensor(jobs), _idle_sensor()]


def _reconcile_sensor(jobs: Sequence[AssetJob]) -> dg.SensorDefinition:
    @dg.sensor(
        name="reconcile_batches",
        jobs=jobs,
        minimum_interval_seconds=1,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Asks for the next run of every open batch (validate, infer, finalize), and of due deliveries.",
    )
    def reconcile(context: dg.SensorEvaluationContext, services: dg.ResourceParam[Services]) -> dg.SensorResult:
        # Runs first: a run that ends between the two reads then counts as active, and is not asked for a second time.
        active = read_active_batches(context.instance)
        opened = services.store.batches.open()
        ended = list(_ended_with_deliveries(services, opened, active))
        if not opened and not ended:
            return dg.SensorResult(skip_reason="no open batch")
        services.pauses.lift_mended(services.configuration_of)
        pauses = services.pauses.standing()
        launches = list(_decide(context.instance, services, opened, active, pauses))
        launches += _decide_deliveries(context.instance, services, ended, active)
        by_id = {batch.id: batch for batch in (*opened, *ended)}
        wanted = dict.fromkeys(launch.batch_id for launch in launches)
        new = [batch_id for batch_id in wanted if not context.instance.has_dynamic_partition(_BATCHES, batch_id)]
        return dg.SensorResult(
            run_requests=[request_run(launch, by_id[launch.batch_id]) for launch in launches],
            dynamic_partitions_requests=[batches.build_add_request(new)] if new else [],
            skip_reason=None if launches else _why_nothing(opened, pauses),
        )

    return reconcile


def _decide(
    instance: dg.DagsterInstance,
    services: Services,
    opened: Sequence[Batch],
    active: ActiveBatches,
    pauses: Sequence[Pause],
) -> Iterator[Launch]:
    now = services.clock()
    # Batches that have a run are left out before the cut: a long queue must not hide the ones behind it.
    idle = (batch for batch in opened if batch.id not in active.unfinished or stop_reason(batch, now))
    for batch in islice(idle, _MOST_BATCHES_PER_TICK):
        chunks = without_lost_results(services.store.chunks.list(batch.id), services.workspace)
        state = read_graph_state(instance, batch.id, [chunk.index for chunk in chunks], active, now)
        yield from decide_launches(batch, chunks, state, now, _is_paused(batch, pauses, now))


def _is_paused(batch: Batch, pauses: Sequence[Pause], now: float) -> Callable[[Chunk], bool]:
    return lambda chunk: find_pause(pauses, batch.id, model_of(batch, chunk), now) is not None


def _why_nothing(opened: Sequence[Batch], pauses: Sequence[Pause]) -> str:
    """Return the reason of the skipped tick, with the pauses that concern an open batch or a model."""
    ids = {batch.id for batch in opened}
    told = [pause for pause in pauses if pause.scope in ids or pause.scope == ALL or model_of_scope(pause.scope)]
    words = [f"{pause.scope} {pause.describe()}" for pause in told[:_MOST_PAUSES_TOLD]]
    return "; ".join([f"{len(opened)} open batches, nothing to launch", *words])


def _ended_with_deliveries(services: Services, opened: Sequence[Batch], active: ActiveBatches) -> Iterator[Batch]:
    """Yield the ended batches with a due delivery that no run is about to make. A stale one is merged first: its run
    delivers too."""
    left_out = {batch.id for batch in opened}.union(active.delivering)
    due = services.store.deliveries.due(services.clock(), _MOST_DELIVERIES_PER_TICK + len(left_out))
    for batch_id in islice((each for each in due if each not in left_out), _MOST_DELIVERIES_PER_TICK):
        with suppress(NotFound):  # retention was faster
            batch = services.store.batches.get(batch_id)
            if not close_untold(batch, services.store):
                yield batch


def _decide_deliveries(
    instance: dg.DagsterInstance, services: Services, ended: Sequence[Batch], active: ActiveBatches
) -> Iterator[Launch]:
    now = services.clock()
    for batch in ended:
        launch = decide_delivery(batch.id, read_graph_state(instance, batch.id, (), active, now), now)
        if launch is not None:
            yield launch


def request_run(launch: Launch, batch: Batch) -> dg.RunRequest:
    """Return the run request of a launch: its job, partition or range of chunks, and priority by deadline."""
    tags = {BATCH_TAG: launch.batch_id, "dagster/priority": str(-batch.expires_at)}
    if launch.step is not Step.INFER or launch.chunks is None:
        return dg.RunRequest(run_key=launch.key, job_name=JOB_OF[launch.step], partition_key=launch.batch_id, tags=tags)
    first, last = (str(cell_key(launch.batch_id, index)) for index in launch.chunks)
    tags["chunks"] = "-".join(slot_key(index) for index in launch.chunks)
    return dg.RunRequest(
        run_key=launch.key,
        job_name=JOB_OF[launch.step],
        tags=tags | {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last},
    )


def _idle_sensor() -> dg.SensorDefinition:
    @dg.sensor(
        name="stop_idle_engine",
        minimum_interval_seconds=_IDLE_CHECK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Stops our engine when nobody has used it for ENGINE_IDLE_SECONDS.",
    )
    def stop_idle(services: dg.ResourceParam[Services]) -> dg.SkipReason:
        limit = services.settings.engine_idle_seconds
        if not limit:
            return dg.SkipReason("ENGINE_IDLE_SECONDS is 0: the engine stays warm")
        stopped = services.engines.stop_idle(limit)
        return dg.SkipReason(f"stopped the idle engine of {stopped}" if stopped else "the engine is in use or off")

    return stop_idle
