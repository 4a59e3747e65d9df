"""What the graph reads of Dagster's history: which batch a run belongs to, and what a run finds already shown."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pytest
from dagster._core.events import StepMaterializationData
from dagster._core.utils import make_new_run_id

from vllm_batch_dagster.core.reconciling import GraphState, ShownResult
from vllm_batch_dagster.defs.history import (
    CHUNK_RESULTS,
    EPOCH_METADATA,
    ActiveBatches,
    batch_of,
    read_active_batches,
    read_graph_state,
    read_shown_result,
)
from vllm_batch_dagster.defs.partitions import cell_key, chunk_cells, split_cell

BATCH = "batch_1"
NO_RUNS = ActiveBatches()
START = 1_700_000_000
ENDED = dg.RunsFilter(tags={"batch": BATCH}, statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE])
SUCCESS, FAILURE = dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE


def add_run(
    instance: dg.DagsterInstance,
    status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED,
    tags: Mapping[str, str] | None = None,
    parent: dg.DagsterRun | None = None,
    created: int = START,
) -> dg.DagsterRun:
    """Record a run that was requested at `created` (unix seconds)."""
    ancestry: dict[str, Any] = {}
    if parent:
        ancestry = {"parent_run_id": parent.run_id, "root_run_id": parent.root_run_id or parent.run_id}
    run = dg.DagsterRun(
        "infer_chunks", make_new_run_id(), status=status, tags={"batch": BATCH} if tags is None else tags, **ancestry
    )
    instance.run_storage.add_historical_run(run, datetime.fromtimestamp(created, UTC).replace(tzinfo=None))
    return run


def show(instance: dg.DagsterInstance, epoch: int | None, run_id: str = "", at: float = START, index: int = 0) -> None:
    """Materialize a chunk at a time, in a run."""
    metadata = {EPOCH_METADATA: epoch} if epoch is not None else {"requests": 0}
    shown = dg.AssetMaterialization(CHUNK_RESULTS, partition=cell_key(BATCH, index), metadata=metadata)
    event = dg.DagsterEvent("ASSET_MATERIALIZATION", "infer_chunks", event_specific_data=StepMaterializationData(shown))
    instance.report_dagster_event(event, run_id or make_new_run_id(), timestamp=float(at))


def answers_again(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    shown = read_shown_result(instance, BATCH, 0, run)
    assert shown is not None
    return not shown.answers_this_request


class TestShownResult:
    def test_a_chunk_that_was_never_shown(self, instance: dg.DagsterInstance) -> None:
        show(instance, 1, index=1)
        assert read_shown_result(instance, BATCH, 0, add_run(instance)) is None

    def test_the_newest_one_counts(self, instance: dg.DagsterInstance) -> None:
        run = add_run(instance)
        show(instance, 1, at=START - 20)
        show(instance, 2, at=START - 10)
        assert read_shown_result(instance, BATCH, 0, run) == ShownResult(2, answers_this_request=False)

    def test_an_empty_slot_shows_no_attempt(self, instance: dg.DagsterInstance) -> None:
        show(instance, None, at=START - 10)
        assert read_shown_result(instance, BATCH, 0, add_run(instance)) == ShownResult(0, answers_this_request=False)

    @pytest.mark.parametrize(("after", "again"), [(-5.0, True), (-0.001, True), (0.0, False), (30.0, False)])
    def test_what_is_younger_than_the_request_answers_it(
        self, instance: dg.DagsterInstance, after: float, again: bool
    ) -> None:
        """So a double click costs one inference."""
        show(instance, 1, at=START + after)
        assert answers_again(instance, add_run(instance)) is again

    def test_a_retry_finds_what_the_failed_run_has_shown(self, instance: dg.DagsterInstance) -> None:
        failed = add_run(instance, FAILURE)
        again = add_run(instance, FAILURE, parent=failed, created=START + 60)
        show(instance, 1, failed.run_id, at=START + 10)
        assert not answers_again(instance, add_run(instance, parent=failed, created=START + 60))
        assert not answers_again(instance, add_run(instance, parent=again, created=START + 90)), "the second retry too"

    @pytest.mark.parametrize("status", [dg.DagsterRunStatus.CANCELED, FAILURE])
    def test_executing_a_broken_run_again_goes_on(
        self, instance: dg.DagsterInstance, status: dg.DagsterRunStatus
    ) -> None:
        broken = add_run(instance, status)
        show(instance, 1, broken.run_id, at=START + 10)
        assert not answers_again(instance, add_run(instance, parent=broken, created=START + 60))

    def test_executing_a_good_run_again_begins_anew(self, instance: dg.DagsterInstance) -> None:
        good = add_run(instance, SUCCESS)
        show(instance, 1, good.run_id, at=START + 10)
        crashed = add_run(instance, FAILURE, parent=good, created=START + 60)
        assert answers_again(instance, crashed)
        retry = add_run(instance, parent=crashed, created=START + 90)
        assert answers_again(instance, retry), "what the good run showed is not what the crashed one was asked for"

    def test_a_run_whose_forerunner_was_purged(self, instance: dg.DagsterInstance) -> None:
        purged = add_run(instance, FAILURE)
        retry = add_run(instance, parent=purged, created=START + 60)
        show(instance, 1, at=START + 10)
        instance.delete_run(purged.run_id)
        assert answers_again(instance, retry)


class TestBatchOfARun:
    @pytest.mark.parametrize(
        ("tags", "expected"),
        [
            ({"batch": BATCH, "dagster/partition": "other"}, BATCH),
            ({"dagster/partition": BATCH}, BATCH),
            ({"dagster/partition": f"{BATCH}|0003"}, BATCH),
            ({"dagster/partition/batch": BATCH, "dagster/partition/chunk": "0003"}, BATCH),
            ({"dagster/asset_partition_range_start": f"{BATCH}|0000"}, BATCH),
            ({"dagster/asset_partition_range_start": BATCH}, BATCH),
            ({}, None),
        ],
    )
    def test_is_read_from_whatever_tags_it_has(
        self, instance: dg.DagsterInstance, tags: dict[str, str], expected: str | None
    ) -> None:
        assert batch_of(add_run(instance, tags=tags)) == expected

    def test_only_unfinished_runs_make_a_batch_active(self, instance: dg.DagsterInstance) -> None:
        for status in (SUCCESS, FAILURE, dg.DagsterRunStatus.CANCELED):
            add_run(instance, status)
        assert read_active_batches(instance) == ActiveBatches()
        add_run(instance)
        add_run(instance, tags={"dagster/partition": "batch_2|0001"})
        add_run(instance, tags={})
        add_run(instance, dg.DagsterRunStatus.NOT_STARTED, tags={"batch": "batch_3"})
        assert read_active_batches(instance) == ActiveBatches({BATCH, "batch_2", "batch_3"}, {BATCH, "batch_2"})


class TestGraphState:
    def read(self, instance: dg.DagsterInstance, *chunks: int, active: ActiveBatches = NO_RUNS) -> GraphState:
        return read_graph_state(instance, BATCH, chunks, active, time.time())

    def test_of_a_batch_that_is_new(self, instance: dg.DagsterInstance) -> None:
        assert self.read(instance, 0, 1) == self.read(instance) == GraphState({})

    def test_the_newest_materialization_of_each_wanted_chunk(self, instance: dg.DagsterInstance) -> None:
        for index in (0, 1, 0, 3):
            show(instance, 1, index=index)
        found = self.read(instance, 0, 1, 2).materialized
        assert set(found) == {0, 1}
        assert found[0] > found[1], "chunk 0 was shown again after chunk 1"

    def test_failures_are_counted_since_the_last_success(self, instance: dg.DagsterInstance) -> None:
        for number, status in enumerate((FAILURE, SUCCESS, FAILURE, FAILURE)):
            add_run(instance, status, created=START + number)
        add_run(instance, FAILURE, tags={"batch": "batch_2"})
        add_run(instance)
        state = self.read(instance, 0)
        assert state.failures == 2
        assert state.newest_run == max(record.storage_id for record in instance.get_run_records(ENDED, limit=1))
        assert not state.active, "whether it is active is told, not read"
        running = self.read(instance, active=ActiveBatches({BATCH}, {BATCH}))
        assert (running.active, running.waiting) == (True, False)
        queued = self.read(instance, active=ActiveBatches({BATCH}))
        assert (queued.active, queued.waiting) == (True, True)


def test_a_cell_is_the_batch_and_the_slot() -> None:
    key = cell_key("batch_7", 12)
    assert str(key) == "batch_7|0012"
    assert split_cell(str(key)) == ("batch_7", 12)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("batches", ["batch_7"])
        cells = chunk_cells(13).get_partition_keys(dynamic_partitions_store=instance)
    assert [str(cell) for cell in cells][-1] == "batch_7|0012"


STEP_FAILED = {"batch": BATCH, "dagster/failure_reason": "STEP_FAILURE"}


@pytest.mark.parametrize(
    ("recent", "failures"),
    [
        ([None] * 10, 3),
        ([None, None], 2),
        ([STEP_FAILED] * 5, 5),
        ([STEP_FAILED, None, None, STEP_FAILED, None, None, STEP_FAILED, STEP_FAILED], 4),
        ([None, None, None, None, STEP_FAILED], 3),
    ],
)
def test_deaths_of_a_process_do_not_let_the_pause_grow(recent: list[dict[str, str] | None], failures: int) -> None:
    """A batch that is killed a hundred times must not wait ten minutes each time."""
    with dg.DagsterInstance.ephemeral() as instance:
        add_run(instance, SUCCESS)
        for tags in recent:
            add_run(instance, FAILURE, tags)
        assert read_graph_state(instance, BATCH, (), NO_RUNS, START).failures == failures
