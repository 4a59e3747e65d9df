"""Deadlines and cancels at every point of a batch's life: output + error = total, whenever they strike."""

import pytest

from tests.unit.conftest import DAY, Rig, id_range, ids, request_lines
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.core.models import RequestCounts, stop_reason
from vllm_batch_dagster.core.reconciling import GraphState, Step, decide_launches
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.core.windows import WindowRule
from vllm_batch_dagster.stages.intake import create_batch

S = BatchStatus
STOPS = pytest.mark.parametrize("status", [S.CANCELLED, S.EXPIRED])


def stop(rig: Rig, batch_id: str, status: BatchStatus) -> None:
    if status is S.CANCELLED:
        rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    else:
        rig.clock.advance(DAY)


def conserve(rig: Rig, batch_id: str, status: BatchStatus, completed: int, total: int) -> None:
    """Check what must hold of every batch that has ended."""
    batch, output, errors = rig.batch(batch_id), rig.output(batch_id), rig.errors(batch_id)
    assert batch.status is status
    assert batch.counts == RequestCounts(total, completed, total - completed)
    assert (len(output), len(errors)) == (completed, total - completed)
    assert sorted([*ids(output), *ids(errors)]) == sorted(id_range(total))
    assert {row["error"]["code"] for row in errors} <= {f"batch_{status.value}"}
    assert all(row["response"] is None and row["error"]["message"] for row in errors)


@STOPS
def test_before_validation_nothing_is_known_of_the_lines(rig: Rig, status: BatchStatus) -> None:
    batch_id = rig.create(rig.upload(request_lines(3)))
    stop(rig, batch_id, status)
    rig.merge(batch_id)
    conserve(rig, batch_id, status, 0, 0)
    assert (rig.batch(batch_id).output_file_id, rig.batch(batch_id).error_file_id) == (None, None)


@STOPS
def test_between_planning_and_the_new_status_every_line_is_known(rig: Rig, status: BatchStatus) -> None:
    """Validation died just before it moved the batch on; the next run finds it stopped."""
    batch_id = rig.create(rig.upload(request_lines(7)))
    stop(rig, batch_id, status)
    twin = rig.create(rig.batch(batch_id).input_file_id)
    rig.store.chunks.plan(batch_id, rig.validate(twin, chunk_size=3).chunks)
    rig.workspace.index_path(batch_id).write_bytes(rig.workspace.index_path(twin).read_bytes())
    rig.merge(batch_id)
    conserve(rig, batch_id, status, 0, 7)


@STOPS
async def test_nothing_was_running(rig: Rig, status: BatchStatus) -> None:
    batch_id = rig.start(7, chunk_size=3)
    stop(rig, batch_id, status)
    rig.merge(batch_id)
    conserve(rig, batch_id, status, 0, 7)


@STOPS
async def test_the_answers_that_are_there_are_kept(rig: Rig, status: BatchStatus) -> None:
    batch_id = rig.start(7, chunk_size=3)
    await rig.infer(batch_id, EchoEngine(), only=[0, 2])
    stop(rig, batch_id, status)
    rig.merge(batch_id)
    conserve(rig, batch_id, status, 4, 7)


@STOPS
async def test_while_the_files_are_written(rig: Rig, status: BatchStatus) -> None:
    """The merge died in `finalizing`; its repeat finds the batch stopped, with every line answered."""
    batch_id = rig.start(4, chunk_size=3)
    await rig.infer(batch_id, EchoEngine())
    rig.store.batches.advance(batch_id, BatchEvent.MERGE, int(rig.clock()))
    stop(rig, batch_id, status)
    rig.merge(batch_id)
    conserve(rig, batch_id, status, 4, 4)
    batch = rig.batch(batch_id)
    assert batch.finalizing_at is not None
    assert batch.completed_at is None


@pytest.mark.parametrize(("window", "seconds"), [("1m", 60), ("90m", 5_400), ("6h", 21_600), ("7d", 604_800)])
def test_the_window_of_the_batch_is_its_deadline(rig: Rig, window: str, seconds: int) -> None:
    params = {"input_file_id": rig.upload(request_lines(2)), "endpoint": "/v1/chat/completions"}
    params["completion_window"] = window
    made = create_batch(params, rig.store, rig.clock, bytes, windows=WindowRule.ANY)
    rig.validate(made.id)
    rig.clock.advance(seconds - 1)
    batch, chunks = rig.batch(made.id), rig.store.chunks.list(made.id)
    assert stop_reason(batch, rig.clock()) is None
    rig.clock.advance(1)
    (launch,) = decide_launches(batch, chunks, GraphState({}), rig.clock())
    assert launch.step is Step.FINALIZE
    rig.merge(made.id)
    conserve(rig, made.id, S.EXPIRED, 0, 2)
    assert rig.batch(made.id).expired_at == made.created_at + seconds
