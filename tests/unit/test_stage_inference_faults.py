"""The inference stage when the engine or the batch stops: what is sent again, what is counted, what is kept."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.conftest import (
    DAY,
    FAST,
    Reply,
    Rig,
    WatchedEngine,
    answer_of,
    id_range,
    ids,
    line_of,
    request_line,
    until,
)
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable, StaleAttempt
from vllm_batch_dagster.core.models import ChunkSummary, RequestCounts, StopReason, Usage
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.stages.inference import ChunkDone

OVERLOADED = answer_of(b'{"error":{"message":"overloaded","type":"x","code":503}}', 503)
LIMITED = answer_of(b'{"error":{"message":"slow down","type":"x","code":429}}', 429)
BROKEN = answer_of(b'{"error":{"message":"a bug in the kernel","type":"InternalServerError","code":500}}', 500)
CORE_DEAD = answer_of(b'{"error":{"message":"EngineCore encountered an issue."}}', 500)
STOPPING = answer_of(b"cannot schedule new futures after shutdown", 500)
ABORTED = answer_of(b'{"choices":[{"finish_reason":"abort","text":"half an ans"}]}')
REFUSED = answer_of(b'{"error":{"message":"too long","type":"BadRequestError","param":"input","code":400}}', 400)


def script(line: int, *replies: Reply) -> Callable[[EngineRequest], Reply]:
    """Faults that give `replies` to the first sends of one line, and the ordinary answer to all else."""
    left = list(replies)

    def faults(request: EngineRequest) -> Reply:
        return left.pop(0) if left and line_of(request) == line else None

    return faults


class DeadEngine(EchoEngine):
    """Dies of whatever it is asked, each time that it is brought back."""

    def __init__(self) -> None:
        super().__init__(lambda _request: EngineUnavailable("reset"), on_recover=self._give_up)

    def _give_up(self) -> None:
        raise EngineFailure("the engine was brought back 3 times without one answer between")


def dies_after(answered: int, engine_of: Callable[[], WatchedEngine]) -> Callable[[EngineRequest], Reply]:
    """Faults of an engine that answers so many requests and is gone until its first recovery."""
    served = 0

    def faults(_request: EngineRequest) -> Reply:
        nonlocal served
        if engine_of().recoveries == 0 and served >= answered:
            return EngineUnavailable("connection reset")
        served += 1
        return None

    return faults


@pytest.mark.parametrize(
    ("replies", "recoveries"),
    [
        ([OVERLOADED, LIMITED] * 5, 0),
        ([CORE_DEAD, STOPPING, CORE_DEAD], 3),
        ([EngineUnavailable("reset")] * 3, 3),
        ([BROKEN, BROKEN], 0),
        ([ABORTED, ABORTED], 0),
        ([OVERLOADED, BROKEN, CORE_DEAD, LIMITED, BROKEN], 1),
    ],
)
async def test_what_passes_is_not_held_against_the_line(rig: Rig, replies: list[Reply], recoveries: int) -> None:
    batch_id = rig.start(3)
    engine = WatchedEngine(script(1, *replies))
    await rig.infer(batch_id, engine)
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) == id_range(3)
    assert engine.recoveries == recoveries
    assert Counter(engine.asked) == {0: 1, 1: len(replies) + 1, 2: 1}
    assert {record.line: record.tries for record in rig.journal(batch_id, 0, 1)}[1] == len(replies) + 1


@pytest.mark.parametrize(("reply", "sends"), [(BROKEN, 3), (ABORTED, 3), (REFUSED, 1)])
async def test_an_answer_that_stays_bad_goes_to_the_error_file(rig: Rig, reply: EngineAnswer, sends: int) -> None:
    batch_id = rig.start(3)
    engine = WatchedEngine(script(1, *[reply] * 10))
    await rig.infer(batch_id, engine)
    rig.merge(batch_id)
    batch = rig.batch(batch_id)
    assert (batch.status, batch.counts) == (BatchStatus.COMPLETED, RequestCounts(3, 2, 1))
    assert Counter(engine.asked) == {0: 1, 1: sends, 2: 1}
    assert ids(rig.output(batch_id)) == ["id-0", "id-2"]
    (line,) = rig.errors(batch_id)
    assert (line["custom_id"], line["response"]["status_code"], line["error"]) == ("id-1", reply.status, None)
    assert reply.body in rig.stored_lines(batch.error_file_id)[0]


async def test_a_real_refusal_of_the_engine_leaves_the_batch_completed(rig: Rig) -> None:
    cold = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": -1}
    batch_id = rig.start(request_line("good") + request_line("cold", body=cold))
    await rig.infer(batch_id, EchoEngine())
    rig.merge(batch_id)
    assert rig.batch(batch_id).status is BatchStatus.COMPLETED
    assert ids(rig.output(batch_id)) == ["good"]
    assert ids(rig.errors(batch_id)) == ["cold"]


async def test_an_engine_that_dies_gets_only_the_missing_lines_again(rig: Rig) -> None:
    batch_id = rig.start(12, chunk_size=10)
    engine = WatchedEngine(lambda request: faults(request), window=4)
    faults = dies_after(5, lambda: engine)
    await rig.infer(batch_id, engine)
    asked = Counter(engine.asked)
    assert engine.recoveries == 1
    assert set(asked) == set(range(12))
    assert sum(asked.values()) <= 12 + 4  # at most the window is redone
    assert [asked[record.line] for record in rig.journal(batch_id, 0, 1)[:5]] == [1] * 5
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) == id_range(12)


async def test_the_next_attempt_sends_only_what_no_journal_answers(rig: Rig) -> None:
    batch_id = rig.start(10, chunk_size=10)

    def no_restart() -> None:
        raise EngineFailure("out of memory")

    engine = WatchedEngine(lambda request: faults(request), window=2, on_recover=no_restart)
    faults = dies_after(4, lambda: WatchedEngine())
    with pytest.raises(EngineFailure, match="out of memory"):
        await rig.infer(batch_id, engine)
    chunk = rig.store.chunks.get(batch_id, 0)
    assert (chunk.is_published, chunk.engine_failures) == (False, 1)
    answered = {record.line for record in rig.journal(batch_id, 0, 1)}
    assert len(answered) == 4
    second, done = WatchedEngine(), list[ChunkDone]()
    await rig.infer(batch_id, second, done=done)
    assert sorted(second.asked) == sorted(set(range(10)) - answered)
    assert [(part.epoch, part.summary.replayed, part.summary.sent) for part in done] == [(2, 4, 6)]
    assert done[0].summary.counts == RequestCounts(10, 10, 0)
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) == id_range(10)


async def test_an_engine_that_dies_of_its_work_ends_in_the_error_file(rig: Rig) -> None:
    batch_id = rig.start(8, chunk_size=5)
    for failures in (1, 2):
        with pytest.raises(EngineFailure, match="without one answer"):
            await rig.infer(batch_id, DeadEngine())
        assert [chunk.engine_failures for chunk in rig.store.chunks.list(batch_id)] == [failures] * 2
        assert not any(chunk.is_published for chunk in rig.store.chunks.list(batch_id))
    done: list[ChunkDone] = []
    assert await rig.infer(batch_id, DeadEngine(), done=done) is None
    assert [chunk.summary.counts for chunk in done] == [RequestCounts(5, 0, 5), RequestCounts(3, 0, 3)]
    assert [chunk.summary.error_codes for chunk in done] == [{"engine_failure": 5}, {"engine_failure": 3}]
    rig.merge(batch_id)
    batch = rig.batch(batch_id)
    assert (batch.status, batch.counts) == (BatchStatus.COMPLETED, RequestCounts(8, 0, 8))
    assert batch.output_file_id is None
    assert [(row["response"], row["error"]["code"]) for row in rig.errors(batch_id)] == [(None, "engine_failure")] * 8
    assert ids(rig.errors(batch_id)) == id_range(8)


async def test_a_rerun_heals_what_the_engine_left(rig: Rig) -> None:
    batch_id = rig.start(5)
    await rig.infer(batch_id, DeadEngine(), policy=replace(FAST, chunk_attempts=1))
    rig.merge(batch_id)
    assert len(rig.errors(batch_id)) == 5
    await rig.infer(batch_id, EchoEngine(), only={0}, fresh={0})
    rig.merge(batch_id)
    batch = rig.batch(batch_id)
    assert (batch.status, batch.counts, batch.error_file_id) == (
        BatchStatus.COMPLETED,
        RequestCounts(5, 5, 0),
        None,
    )
    assert ids(rig.output(batch_id)) == id_range(5)


async def test_answers_before_the_last_failure_are_kept(rig: Rig) -> None:
    batch_id = rig.start(6, chunk_size=3)

    def no_restart() -> None:
        raise EngineFailure("gone for good")

    engine = WatchedEngine(lambda request: faults(request), window=1, on_recover=no_restart)
    faults = dies_after(4, lambda: WatchedEngine())
    done: list[ChunkDone] = []
    await rig.infer(batch_id, engine, policy=replace(FAST, chunk_attempts=1), done=done)
    assert [(chunk.index, chunk.summary.counts) for chunk in done] == [
        (0, RequestCounts(3, 3, 0)),
        (1, RequestCounts(3, 1, 2)),
    ]
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) == id_range(4)
    assert [row["error"]["code"] for row in rig.errors(batch_id)] == ["engine_failure"] * 2


async def test_a_superseded_attempt_cannot_publish(rig: Rig) -> None:
    batch_id = rig.start(5)
    engine = WatchedEngine(holds=lambda _line: True)
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=replace(FAST, poll_seconds=3600)))
    await until(lambda: len(engine.in_flight) == 5)
    newer = rig.store.chunks.begin(batch_id, 0, fresh=False, run_id="elsewhere", now=0)
    engine.release()
    with pytest.raises(StaleAttempt, match="superseded by attempt 2"):
        await run
    assert not rig.store.chunks.get(batch_id, 0).is_published
    rig.store.chunks.publish(newer, ChunkSummary(RequestCounts(5, 5, 0), Usage()), 0)
    assert rig.store.chunks.get(batch_id, 0).published_epoch == 2


async def test_a_superseded_attempt_stops_at_its_next_report(rig: Rig) -> None:
    batch_id = rig.start(10, chunk_size=10)
    engine = WatchedEngine(holds=lambda line: line >= 3, window=5)
    run = asyncio.create_task(rig.infer(batch_id, engine))
    await until(lambda: rig.batch(batch_id).counts.completed == 3)
    rig.store.chunks.begin(batch_id, 0, fresh=False, run_id="elsewhere", now=0)
    engine.holds = lambda line: line >= 4  # one more answer, and the others never
    with pytest.raises(StaleAttempt, match="superseded by attempt 2"):
        await run
    assert not engine.in_flight
    assert not rig.store.chunks.get(batch_id, 0).is_published


@pytest.mark.parametrize("reason", StopReason)
async def test_a_stop_keeps_what_is_done_and_sends_nothing_more(rig: Rig, reason: StopReason) -> None:
    batch_id = rig.start(20, chunk_size=5)
    engine = WatchedEngine(holds=lambda line: line >= 7, window=4)
    run = asyncio.create_task(rig.infer(batch_id, engine))
    await until(lambda: engine.in_flight == {7, 8, 9, 10} and rig.store.chunks.get(batch_id, 0).is_published)
    if reason is StopReason.CANCELLED:
        rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    else:
        rig.clock.advance(DAY)
    assert await run is reason
    assert sorted(engine.asked) == list(range(11))
    assert not engine.in_flight
    chunks = rig.store.chunks.list(batch_id)
    assert [(chunk.is_published, chunk.epoch) for chunk in chunks] == [(True, 1), (False, 1), (False, 1), (False, 0)]
    rig.merge(batch_id)
    batch = rig.batch(batch_id)
    assert batch.status is (BatchStatus.CANCELLED if reason is StopReason.CANCELLED else BatchStatus.EXPIRED)
    assert batch.counts == RequestCounts(20, 7, 13)
    assert [chunk.published_epoch for chunk in rig.store.chunks.list(batch_id)] == [1, 2, 2, 1]
    assert ids(rig.output(batch_id)) == id_range(7)
    assert ids(rig.errors(batch_id)) == id_range(7, 20)
    assert {row["error"]["code"] for row in rig.errors(batch_id)} == {reason.value}


async def test_a_run_that_is_cancelled_from_outside_keeps_its_answers(rig: Rig) -> None:
    batch_id = rig.start(10, chunk_size=10)
    engine = WatchedEngine(holds=lambda line: line >= 4)
    slow = replace(FAST, commit_seconds=3600, poll_seconds=3600)
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=slow))
    await until(lambda: engine.in_flight == set(range(4, 10)))
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    second = WatchedEngine()
    await rig.infer(batch_id, second)
    assert sorted(second.asked) == list(range(4, 10))
