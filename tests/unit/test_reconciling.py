"""What is launched for each state of a batch and of the graph."""

from collections.abc import Sequence
from dataclasses import replace

from vllm_batch_dagster.core.models import Batch, Chunk, ChunkRange, ChunkSummary, RequestCounts, Usage
from vllm_batch_dagster.core.reconciling import (
    AttemptPlan,
    GraphState,
    Launch,
    ShownResult,
    Step,
    decide_delivery,
    decide_launches,
    pause_after,
    plan_attempt,
)
from vllm_batch_dagster.core.states import BatchStatus

BATCH = Batch("batch_1", "file_1", "/v1/chat/completions", "24h", BatchStatus.IN_PROGRESS, 0, 86_400)
CHUNKS = [Chunk("batch_1", ChunkRange(index, index * 10, 10, 0, 1)) for index in range(4)]
PUBLISHED = [replace(chunk, epoch=1, base_epoch=1, published_epoch=1) for chunk in CHUNKS]
NOTHING = GraphState({})
NOW = 1000.0


def launched(
    batch: Batch, graph: GraphState, now: float = NOW, chunks: Sequence[Chunk] = PUBLISHED
) -> list[tuple[Step, tuple[int, int] | None]]:
    return [(launch.step, launch.chunks) for launch in decide_launches(batch, chunks, graph, now)]


def test_the_path_of_a_batch() -> None:
    assert launched(replace(BATCH, status=BatchStatus.VALIDATING), NOTHING) == [(Step.VALIDATE, None)]
    assert launched(BATCH, NOTHING, chunks=CHUNKS) == [(Step.INFER, (0, 3))]
    assert launched(BATCH, GraphState({0: 5, 2: 6})) == [(Step.INFER, (1, 1)), (Step.INFER, (3, 3))]
    assert launched(BATCH, GraphState({0: 5, 1: 6, 2: 7, 3: 8})) == [(Step.FINALIZE, None)]


def test_a_chunk_that_is_shown_but_has_no_result_is_run() -> None:
    """Its slot was shown as empty when the batch was planned with fewer chunks."""
    shown = GraphState({0: 5, 1: 6, 2: 7, 3: 8})
    assert launched(BATCH, shown, chunks=[*PUBLISHED[:3], CHUNKS[3]]) == [(Step.INFER, (3, 3))]


def test_paused_chunks_wait_and_nothing_else() -> None:
    def asked(batch: Batch, graph: GraphState, paused: set[int], chunks: Sequence[Chunk]) -> list[Step]:
        return [each.step for each in decide_launches(batch, chunks, graph, NOW, lambda chunk: chunk.index in paused)]

    every = {0, 1, 2, 3}
    assert asked(BATCH, NOTHING, every, CHUNKS) == []
    launches = decide_launches(BATCH, CHUNKS, NOTHING, NOW, lambda chunk: chunk.index == 1)
    assert [launch.chunks for launch in launches] == [(0, 0), (2, 3)]
    assert asked(replace(BATCH, status=BatchStatus.VALIDATING), NOTHING, every, CHUNKS) == [Step.VALIDATE]
    assert asked(BATCH, GraphState({0: 5, 1: 6, 2: 7, 3: 8}), every, PUBLISHED) == [Step.FINALIZE]
    assert asked(replace(BATCH, status=BatchStatus.CANCELLING), NOTHING, every, CHUNKS) == [Step.FINALIZE]
    assert asked(replace(BATCH, expires_at=0), NOTHING, every, CHUNKS) == [Step.FINALIZE]


def test_nothing_while_a_run_is_active() -> None:
    for waiting in (False, True):
        assert launched(BATCH, GraphState({}, active=True, waiting=waiting)) == []


def test_a_batch_that_stops_waits_for_no_run_in_the_queue() -> None:
    cancelled = replace(BATCH, status=BatchStatus.CANCELLING)
    assert launched(cancelled, GraphState({}, active=True)) == []
    assert launched(cancelled, GraphState({}, active=True, waiting=True)) == [(Step.FINALIZE, None)]
    failing = GraphState({}, failures=20, last_ended=NOW)
    assert launched(cancelled, failing) == [(Step.FINALIZE, None)]


def test_a_finished_batch_is_merged_again_only_after_a_new_result() -> None:
    done = replace(BATCH, status=BatchStatus.COMPLETED, result_version=4, merged_version=4)
    assert launched(done, GraphState({0: 5, 1: 6, 2: 7, 3: 8})) == []
    assert launched(replace(done, result_version=5), GraphState({0: 9, 1: 6, 2: 7, 3: 8})) == [(Step.FINALIZE, None)]


def test_cancel_and_deadline_go_straight_to_the_merge() -> None:
    assert launched(replace(BATCH, status=BatchStatus.CANCELLING), NOTHING) == [(Step.FINALIZE, None)]
    assert launched(BATCH, NOTHING, now=86_400) == [(Step.FINALIZE, None)]


def test_a_delivery_waits_for_no_run_but_after_failures() -> None:
    launch = decide_delivery("batch_1", GraphState({}, active=True, newest_run=7), NOW)
    assert launch == Launch(Step.DELIVER, "batch_1", "deliver:batch_1:7")
    failing = GraphState({}, failures=3, last_ended=NOW)
    assert decide_delivery("batch_1", failing, NOW + 5) is None
    assert decide_delivery("batch_1", failing, NOW + 11) is not None


def test_keys_change_only_when_another_run_has_ended() -> None:
    def keys(run: int) -> list[str]:
        return [launch.key for launch in decide_launches(BATCH, CHUNKS, GraphState({}, newest_run=run), NOW)]

    assert keys(1) == keys(1)
    assert keys(1) != keys(2)


def test_repeated_failures_are_asked_for_less_and_less_often() -> None:
    failed = GraphState({}, newest_run=3, failures=3, last_ended=NOW)
    assert launched(BATCH, failed, NOW + 5) == []
    assert launched(BATCH, failed, NOW + 11) == [(Step.INFER, (0, 3))]
    assert pause_after(100) == 600.0


def test_what_a_run_does_with_a_chunk() -> None:
    new = CHUNKS[0]
    published = replace(new, epoch=2, base_epoch=1, published_epoch=2)
    resumed = replace(new, epoch=3, base_epoch=3, published_epoch=2)
    assert plan_attempt(new, None) is AttemptPlan.RESUME
    assert plan_attempt(resumed, ShownResult(2, answers_this_request=False)) is AttemptPlan.RESUME
    assert plan_attempt(published, None) is AttemptPlan.REPORT
    assert plan_attempt(published, ShownResult(1, answers_this_request=True)) is AttemptPlan.REPORT
    assert plan_attempt(published, ShownResult(2, answers_this_request=True)) is AttemptPlan.SKIP
    assert plan_attempt(published, ShownResult(2, answers_this_request=False)) is AttemptPlan.REPEAT


def test_a_chunk_that_was_given_up_is_healed_and_not_repeated() -> None:
    summary = ChunkSummary(RequestCounts(10, 4, 6), Usage(), error_codes={"400": 1, "engine_failure": 5})
    given_up = replace(PUBLISHED[0], summary=summary)
    assert plan_attempt(given_up, ShownResult(1, answers_this_request=False)) is AttemptPlan.RESUME
    assert plan_attempt(given_up, ShownResult(1, answers_this_request=True)) is AttemptPlan.SKIP
    assert plan_attempt(given_up, None) is AttemptPlan.REPORT
