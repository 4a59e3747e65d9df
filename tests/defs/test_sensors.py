"""What the sensors ask for, given the store and what Dagster knows: called directly, without a daemon."""

from pathlib import Path

import dagster as dg
import pytest

from tests.defs.graph import RANGE_END, RANGE_START, Graph, chunk_range
from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.core.reconciling import Step
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.defs.history import ActiveBatches, read_active_batches
from vllm_batch_dagster.defs.jobs import JOB_OF
from vllm_batch_dagster.stages.intake import cancel_batch

UNFINISHED = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)


def asked(graph: Graph) -> list[dg.RunRequest]:
    return list(graph.tick().run_requests or ())


def jobs(graph: Graph) -> list[str | None]:
    return [request.job_name for request in asked(graph)]


def cancel(graph: Graph, batch_id: str) -> None:
    cancel_batch(batch_id, graph.services.store, graph.services.clock)


def at(graph: Graph, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the sensor's clock stand at `seconds`."""
    monkeypatch.setattr(graph.services, "clock", FixedClock(seconds))


def test_the_path_of_a_batch(graph: Graph) -> None:
    """Validate, infer, finalize, nothing."""
    batch_id = graph.submit(8)
    batch = graph.batch(batch_id)
    tags = {"batch": batch_id, "dagster/priority": str(-batch.expires_at)}

    (validate,) = asked(graph)
    assert (validate.job_name, validate.partition_key, validate.tags) == ("validate_batch", batch_id, tags)
    assert graph.launch(validate).success
    assert graph.batch(batch_id).status is BatchStatus.IN_PROGRESS

    (infer,) = asked(graph)
    assert (infer.job_name, infer.partition_key) == ("infer_chunks", None)
    cells = {RANGE_START: f"{batch_id}|0000", RANGE_END: f"{batch_id}|0002", "chunks": "0000-0002"}
    assert infer.tags == tags | cells
    assert graph.launch(infer).success
    assert graph.batch(batch_id).status is BatchStatus.IN_PROGRESS

    (finalize,) = asked(graph)
    assert (finalize.job_name, finalize.partition_key, finalize.tags) == ("finalize_batch", batch_id, tags)
    assert graph.launch(finalize).success
    assert graph.batch(batch_id).status is BatchStatus.COMPLETED

    ended = graph.tick()
    assert not ended.run_requests
    assert ended.skip_reason is not None
    assert str(ended.skip_reason.skip_message) == "no open batch"
    assert len({validate.run_key, infer.run_key, finalize.run_key}) == 3


def test_nothing_without_batches(graph: Graph) -> None:
    assert asked(graph) == []
    assert graph.instance.get_dynamic_partitions("batches") == []


def test_a_new_batch_gets_its_partition_once(graph: Graph) -> None:
    first, second = graph.submit(1), graph.submit(1)
    (added,) = graph.tick().dynamic_partitions_requests or ()
    assert (added.partitions_def_name, list(added.partition_keys)) == ("batches", [first, second])
    assert set(graph.instance.get_dynamic_partitions("batches")) == {first, second}
    assert not graph.tick().dynamic_partitions_requests


def test_the_same_state_asks_under_the_same_key(graph: Graph) -> None:
    """Dagster drops the second request: two ticks before the run is seen cost one run."""
    graph.submit(3)
    assert [request.run_key for request in asked(graph)] == [request.run_key for request in asked(graph)]


def test_an_earlier_deadline_goes_first(graph: Graph) -> None:
    late = graph.submit(1, expires_at=3_000_000_000)
    soon = graph.submit(1, expires_at=2_900_000_000)
    priorities = {request.partition_key: int(request.tags["dagster/priority"]) for request in asked(graph)}
    assert priorities[soon] > priorities[late]


@pytest.mark.parametrize("status", UNFINISHED)
def test_nothing_while_a_run_of_the_batch_is_unfinished(graph: Graph, status: dg.DagsterRunStatus) -> None:
    batch_id, other = graph.submit(3), graph.submit(3)
    graph.create_run("validate_batch", batch_id, status=status, tags={"batch": batch_id})
    assert [request.partition_key for request in asked(graph)] == [other]


@pytest.mark.parametrize("step", ["validate_batch", "infer_chunks", "finalize_batch"])
def test_a_run_that_ends_during_the_tick_is_not_asked_for_again(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It ends just before the sensor reads the runs: what was read of the batch must not be older than that."""
    batch_id = graph.submit(3)
    while (requests := asked(graph))[0].job_name != step:
        graph.launch(requests[0])

    def read(instance: dg.DagsterInstance) -> ActiveBatches:
        assert graph.launch(requests[0]).success
        return read_active_batches(instance)

    monkeypatch.setattr("vllm_batch_dagster.defs.sensors.read_active_batches", read)
    assert step not in jobs(graph)
    assert len(graph.instance.get_runs(dg.RunsFilter(job_name=step, tags={"batch": batch_id}))) == 1


def test_a_cancelled_batch_does_not_wait_for_its_run_in_the_queue(graph: Graph) -> None:
    """The queue may be as long as another batch takes."""
    batch_id = graph.submit(3)
    graph.step()
    queued = graph.create_run("infer_chunks", status=dg.DagsterRunStatus.QUEUED, tags={"batch": batch_id})
    cancel(graph, batch_id)
    (finalize,) = asked(graph)
    assert graph.launch(finalize).success
    assert graph.batch(batch_id).status is BatchStatus.CANCELLED
    graph.instance.delete_run(queued.run_id)
    assert asked(graph) == []


def test_batches_with_a_run_do_not_hide_those_behind_them(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_batch_dagster.defs.sensors._MOST_BATCHES_PER_TICK", 2)
    busy = [graph.submit(3) for _ in range(3)]
    for batch_id in busy:
        graph.create_run("validate_batch", batch_id, tags={"batch": batch_id})
    late = graph.submit(3)
    assert [request.partition_key for request in asked(graph)] == [late]


@pytest.mark.parametrize("kind", ["range", "cell", "batch"])
def test_a_run_that_a_person_launched_counts_too(graph: Graph, kind: str) -> None:
    """The UI sets no tag of ours: the batch is read from the tags of the partition."""
    batch_id = graph.submit(3)
    assert all(result.success for result in graph.step())
    assert jobs(graph) == ["infer_chunks"]
    tags = {
        "range": chunk_range(batch_id, 0, 0),
        "cell": {"dagster/partition": f"{batch_id}|0000", "dagster/partition/batch": batch_id},
        "batch": {"dagster/partition": batch_id},
    }[kind]
    graph.create_run("infer_chunks", tags=tags)
    assert jobs(graph) == []


def test_a_missing_chunk_is_asked_for_alone(graph: Graph) -> None:
    batch_id = graph.submit(9)
    graph.step()
    graph.run_chunks(batch_id, 1, 1)
    assert [(request.tags[RANGE_START], request.tags[RANGE_END]) for request in asked(graph)] == [
        (f"{batch_id}|0000", f"{batch_id}|0000"),
        (f"{batch_id}|0002", f"{batch_id}|0002"),
    ]


def test_a_failure_is_asked_for_again_with_growing_pauses(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    graph.submit(3)
    monkeypatch.setattr("vllm_batch_dagster.defs.assets.validate_batch", fail)
    keys: list[str | None] = []
    for _ in range(3):
        (request,) = asked(graph)
        keys.append(request.run_key)
        assert not graph.launch(request).success
    assert len(set(keys)) == 3, "a key that was used is never launched again"
    pauses = []
    for _ in range(3):
        ended = last_end(graph)
        pauses.append(next(pause for pause in (1, 11, 21, 41, 81) if is_asked(graph, monkeypatch, ended + pause)))
        (request,) = asked(graph)
        assert not graph.launch(request).success
    assert pauses == [11, 21, 41]


def fail(*_: object) -> None:
    raise RuntimeError("the disk is full")


def last_end(graph: Graph) -> float:
    return max(record.end_time or 0.0 for record in graph.instance.get_run_records())


def is_asked(graph: Graph, monkeypatch: pytest.MonkeyPatch, now: float) -> bool:
    at(graph, monkeypatch, now)
    return jobs(graph) != []


def test_a_run_that_the_daemon_will_retry_is_waited_for(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = graph.submit(3)
    monkeypatch.setattr("vllm_batch_dagster.defs.assets.validate_batch", fail)
    (request,) = asked(graph)
    run_id = graph.launch(request).run_id
    graph.instance.add_run_tags(run_id, {"dagster/will_retry": "true"})
    assert jobs(graph) == []
    at(graph, monkeypatch, last_end(graph) + 61)
    assert jobs(graph) == ["validate_batch"], "the daemon has had its time"
    at(graph, monkeypatch, last_end(graph) + 1)
    graph.instance.add_run_tags(run_id, {"dagster/auto_retry_run_id": "another"})
    assert jobs(graph) == ["validate_batch"], f"the retry of {batch_id} has ended, too"


def test_a_cancelled_batch_goes_straight_to_the_merge(graph: Graph) -> None:
    batch_id = graph.submit(3)
    graph.step()
    cancel(graph, batch_id)
    assert jobs(graph) == ["finalize_batch"]
    assert all(result.success for result in graph.step())
    assert graph.batch(batch_id).status is BatchStatus.CANCELLED
    assert asked(graph) == []


def test_a_batch_that_is_cancelled_before_validation(graph: Graph) -> None:
    batch_id = graph.submit(3)
    cancel(graph, batch_id)
    assert jobs(graph) == ["finalize_batch"]
    assert all(result.success for result in graph.step())
    assert graph.batch(batch_id).status is BatchStatus.CANCELLED


def test_an_expired_batch_goes_straight_to_the_merge(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = graph.submit(3)
    graph.step()
    at(graph, monkeypatch, graph.batch(batch_id).expires_at)
    assert jobs(graph) == ["finalize_batch"]
    assert all(result.success for result in graph.step())
    assert graph.batch(batch_id).status is BatchStatus.EXPIRED
    assert asked(graph) == []


def test_a_chunk_that_was_run_again_asks_for_one_merge(graph: Graph) -> None:
    batch_id = graph.submit(8)
    before = graph.finish(batch_id)
    assert graph.run_chunks(batch_id, 1, 1).success
    assert graph.batch(batch_id).is_stale
    (request,) = asked(graph)
    assert request.job_name == "finalize_batch"
    assert graph.launch(request).success
    assert asked(graph) == []
    after = graph.batch(batch_id)
    assert after.status is BatchStatus.COMPLETED
    assert after.output_file_id != before.output_file_id
    assert len(graph.shown("merged_output", batch_id)) == 2


def test_a_batch_that_failed_validation_is_left_alone(graph: Graph) -> None:
    batch_id = graph.submit([b"not json"])
    assert all(result.success for result in graph.step())
    assert graph.batch(batch_id).status is BatchStatus.FAILED
    assert asked(graph) == []


def test_a_batch_that_stopped_while_merging_is_merged(graph: Graph) -> None:
    batch_id = graph.submit(3)
    graph.step()
    graph.step()
    graph.services.store.batches.advance(batch_id, BatchEvent.MERGE, 1)
    assert jobs(graph) == ["finalize_batch"]
    assert all(result.success for result in graph.step())
    assert graph.batch(batch_id).status is BatchStatus.COMPLETED


def test_every_step_has_its_job(graph: Graph) -> None:
    names = {name for name in (job.name for job in graph.definitions.get_repository_def().get_all_jobs())}
    assert set(JOB_OF) == set(Step)
    assert set(JOB_OF.values()) <= names


@pytest.mark.parametrize(("seconds", "said"), [(600, "in use or off"), (0, "stays warm")])
def test_the_idle_sensor_leaves_an_engine_alone(
    tmp_path: Path, instance: dg.DagsterInstance, seconds: int, said: str
) -> None:
    graph = Graph(tmp_path, instance, engine_idle_seconds=seconds)
    assert said in idle_sensor_says(graph)


def test_the_idle_sensor_stops_an_idle_engine(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    graph = Graph(tmp_path, instance, engine_idle_seconds=1)
    now = FixedClock()
    graph.use_engine(clock=now)
    graph.finish(graph.submit(1))
    now.advance(0.5)
    assert "in use or off" in idle_sensor_says(graph)
    now.advance(1)
    assert idle_sensor_says(graph) == "stopped the idle engine of tiny"


def idle_sensor_says(graph: Graph) -> str:
    sensor = graph.definitions.resolve_sensor_def("stop_idle_engine")
    skipped = sensor(dg.build_sensor_context(instance=graph.instance, resources={"services": graph.services}))
    assert isinstance(skipped, dg.SkipReason)
    return str(skipped.skip_message)
