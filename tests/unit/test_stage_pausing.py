"""The inference stage and pauses: nothing new is sent, what is in flight is kept, nothing counts as a failure."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import pytest

from tests.unit.conftest import DAY, FAST, TINY, Reply, Rig, WatchedEngine, id_range, ids, line_of, until
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.core.errors import (
    BatchError,
    ConfigurationError,
    CorruptJournal,
    EngineFailure,
    EngineStartFailed,
    EngineUnavailable,
    EngineUnreachable,
    StorageFailure,
)
from vllm_batch_dagster.core.models import Model, RequestCounts, StopReason
from vllm_batch_dagster.core.pauses import ALL, Pause, PauseCause, model_scope
from vllm_batch_dagster.core.ports import EngineLease, EngineRequest, Report
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.stages.pausing import PauseBoard, PausePolicy, RunGate, lift

AT_ONCE = replace(FAST, pauses=PausePolicy(patience=0.0))
PATIENT = replace(FAST, pauses=PausePolicy(patience=3600.0))


def operator(scope: str = ALL) -> Pause:
    return Pause(scope, PauseCause.OPERATOR, "moving house", 1)


def outcomes(rig: Rig, batch_id: str, chunk: int = 0) -> list[str | None]:
    return [attempt.outcome for attempt in rig.store._tables.attempts[batch_id, chunk]]


class Refusing(EchoEngine):
    """Cannot be had: raises what it is given, one after the other, then works."""

    def __init__(self, *errors: BatchError) -> None:
        super().__init__()
        self.errors, self.leases = list(errors), 0

    def lease(self, model: Model, report: Report) -> AbstractAsyncContextManager[EngineLease]:
        self.leases += 1
        return self._fail(self.errors.pop(0)) if self.errors else super().lease(model, report)

    @asynccontextmanager
    async def _fail(self, error: BatchError):  # type: ignore[no-untyped-def]
        raise error
        yield


class Starting(EchoEngine):
    """Starts for ever."""

    is_starting = False

    def lease(self, model: Model, report: Report) -> AbstractAsyncContextManager[EngineLease]:
        return self._wait()

    @asynccontextmanager
    async def _wait(self):  # type: ignore[no-untyped-def]
        self.is_starting = True
        await asyncio.Event().wait()
        yield


async def test_a_pause_sends_nothing_new_and_keeps_what_is_in_flight(rig: Rig) -> None:
    batch_id = rig.start(20, chunk_size=10)
    engine = WatchedEngine(holds=lambda line: line >= 5, window=3)
    said: list[str] = []
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=AT_ONCE, said=said))
    await until(lambda: engine.in_flight == {5, 6, 7})
    rig.store.pauses.put(operator())
    await until(lambda: any("no new line is sent" in sentence for sentence in said))
    engine.release()
    assert await run == operator()
    assert sorted(engine.asked) == list(range(8))
    assert {record.line for record in rig.journal(batch_id, 0, 1)} == set(range(8))
    chunk = rig.store.chunks.get(batch_id, 0)
    assert (chunk.is_published, chunk.engine_failures, outcomes(rig, batch_id)) == (False, 0, ["paused"])
    rig.store.pauses.remove(ALL, PauseCause.OPERATOR)
    second = WatchedEngine()
    assert await rig.infer(batch_id, second, policy=AT_ONCE) is None
    assert sorted(second.asked) == list(range(8, 20))
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) == id_range(20)


async def test_a_pause_that_ends_soon_is_waited_for(rig: Rig) -> None:
    batch_id = rig.start(10)
    engine = WatchedEngine(holds=lambda line: line == 2, window=1)
    said: list[str] = []
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=PATIENT, said=said))
    await until(lambda: engine.in_flight == {2})
    rig.store.pauses.put(operator())
    await until(lambda: any("no new line is sent" in sentence for sentence in said))
    engine.release()
    await until(lambda: not engine.in_flight)
    assert engine.asked == [0, 1, 2]
    rig.store.pauses.remove(ALL, PauseCause.OPERATOR)
    assert await run is None
    assert engine.asked == list(range(10))
    assert outcomes(rig, batch_id) == ["published"]


async def test_the_last_lines_in_flight_finish_their_chunk(rig: Rig) -> None:
    batch_id = rig.start(3)
    engine = WatchedEngine(holds=lambda _line: True, window=4)
    said: list[str] = []
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=AT_ONCE, said=said))
    await until(lambda: len(engine.in_flight) == 3)
    rig.store.pauses.put(operator())
    await until(lambda: any("no new line is sent" in sentence for sentence in said))
    engine.release()
    assert await run is None
    assert rig.store.chunks.get(batch_id, 0).is_published


@pytest.mark.parametrize("scope", [ALL, "batch", model_scope("tiny")])
async def test_a_run_that_begins_in_a_pause_does_not_touch_the_engine(rig: Rig, scope: str) -> None:
    batch_id, engine = rig.start(3), Refusing()
    pause = operator(batch_id if scope == "batch" else scope)
    rig.store.pauses.put(pause)
    assert await rig.infer(batch_id, engine, policy=PATIENT) == pause
    assert engine.leases == 0
    assert rig.store.chunks.get(batch_id, 0).epoch == 0


@pytest.mark.parametrize("scope", ["batch_99", model_scope("other")])
async def test_the_pause_of_another_is_none_of_ours(rig: Rig, scope: str) -> None:
    batch_id = rig.start(3)
    rig.store.pauses.put(operator(scope))
    assert await rig.infer(batch_id, EchoEngine(), policy=AT_ONCE) is None


async def test_a_pause_is_heard_while_the_engine_starts(rig: Rig) -> None:
    batch_id, engine = rig.start(3), Starting()
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=AT_ONCE))
    await until(lambda: engine.is_starting)
    rig.store.pauses.put(operator())
    assert await run == operator()


@pytest.mark.parametrize("error", [EngineStartFailed("no memory"), EngineUnreachable("refused"), EngineFailure("odd")])
async def test_an_engine_that_cannot_be_had_opens_the_breaker(rig: Rig, error: BatchError) -> None:
    batch_id = rig.start(6, chunk_size=3)
    engine = Refusing(error, error)
    strict = replace(AT_ONCE, chunk_attempts=1)
    first = await rig.infer(batch_id, engine, policy=strict)
    assert isinstance(first, Pause)
    assert (first.scope, first.cause, first.until) == (model_scope("tiny"), PauseCause.ENGINE, int(rig.clock()) + 30)
    assert str(error) in first.reason
    assert await rig.infer(batch_id, engine, policy=strict) == first
    assert engine.leases == 1, "while it is open nothing is tried"
    rig.clock.advance(30)
    second = await rig.infer(batch_id, engine, policy=strict)
    assert isinstance(second, Pause)
    assert (second.strikes, second.until) == (2, int(rig.clock()) + 60)
    assert [(chunk.engine_failures, chunk.is_published) for chunk in rig.store.chunks.list(batch_id)] == [
        (0, False)
    ] * 2
    rig.clock.advance(60)
    assert await rig.infer(batch_id, engine, policy=strict) is None
    assert list(rig.store.pauses.list()) == [], "the first answer forgets the strikes"
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) == id_range(6)


@pytest.mark.parametrize("error", [EngineStartFailed("no such model", may_pass=False), ConfigurationError("bad flag")])
async def test_what_no_repetition_mends_waits_for_a_person_or_a_change(rig: Rig, error: BatchError) -> None:
    batch_id, engine = rig.start(3), Refusing(error)
    pause = await rig.infer(batch_id, engine, policy=AT_ONCE)
    assert isinstance(pause, Pause)
    assert (pause.until, bool(pause.mark)) == (None, True)
    assert "vllm-batch resume" in pause.reason
    board = PauseBoard(rig.store.pauses, rig.clock)
    board.lift_mended(lambda _name: pause.mark)
    assert list(board.standing()) == [pause]
    board.lift_mended(lambda name: f"another configuration of {name}")
    assert list(board.standing()) == []
    assert await rig.infer(batch_id, engine, policy=AT_ONCE) is None


async def test_an_operator_ends_what_is_meant(rig: Rig) -> None:
    batch_id = rig.start(1)
    ours = [operator(batch_id), replace(operator(model_scope("tiny")), cause=PauseCause.ENGINE)]
    others = [operator("batch_99"), operator(model_scope("other")), operator()]
    for pause in (*ours, *others):
        rig.store.pauses.put(pause)
    ended = lift(rig.store.pauses, rig.batch(batch_id), ["tiny"])
    assert sorted(ended, key=str) == sorted(ours, key=str)
    assert {pause.scope for pause in lift(rig.store.pauses, None)} == {model_scope("other"), ALL}
    assert list(rig.store.pauses.list()) == [operator("batch_99")]


async def test_an_engine_that_dies_under_work_and_does_not_start_again_opens_the_breaker(rig: Rig) -> None:
    batch_id = rig.start(6)

    def faults(request: EngineRequest) -> Reply:
        return EngineUnavailable("reset") if line_of(request) == 4 else None

    def no_restart() -> None:
        raise EngineStartFailed("the driver is gone")

    engine = WatchedEngine(faults, window=1, on_recover=no_restart)
    pause = await rig.infer(batch_id, engine, policy=replace(AT_ONCE, chunk_attempts=1))
    assert isinstance(pause, Pause)
    assert pause.cause is PauseCause.ENGINE
    assert rig.store.chunks.get(batch_id, 0).engine_failures == 0
    assert len(rig.journal(batch_id, 0, 1)) == 4


async def test_a_breaker_is_forgotten_although_the_look_that_does_it_is_cut_short(rig: Rig) -> None:
    """The run's last line ends while its watcher, which is cancelled then, waits for a thread."""
    batch_id = rig.start(1)
    rig.store.pauses.put(replace(operator(), cause=PauseCause.STORAGE))
    board = PauseBoard(rig.store.pauses, rig.clock)
    gate = RunGate(board, rig.batch(batch_id), [], TINY, PausePolicy(), lambda _: None)
    gate.has_answer = True
    look = asyncio.create_task(gate.look())
    await asyncio.sleep(0)
    look.cancel()
    await asyncio.wait([look])
    rig.store.pauses.put(replace(operator(), cause=PauseCause.STORAGE))  # as if the thread had not come to it
    await gate.settle()
    assert list(rig.store.pauses.list()) == []


async def test_damage_is_no_pause(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = rig.start(3)
    monkeypatch.setattr("vllm_batch_dagster.stages.attempts.seal_chunk", refuse(CorruptJournal("a byte flipped")))
    with pytest.raises(CorruptJournal):
        await rig.infer(batch_id, EchoEngine(), policy=AT_ONCE)
    assert list(rig.store.pauses.list()) == []


async def test_a_store_that_takes_nothing_still_pauses_the_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = rig.start(3)
    full = refuse(StorageFailure("database is locked"))
    for records, name in ((rig.store.chunks, "publish"), (rig.store.chunks, "give_back"), (rig.store.pauses, "put")):
        monkeypatch.setattr(records, name, full)
    pause = await rig.infer(batch_id, EchoEngine(), policy=AT_ONCE)
    assert isinstance(pause, Pause)
    assert (pause.scope, pause.cause, pause.reason) == (ALL, PauseCause.STORAGE, "database is locked")
    monkeypatch.undo()
    second = WatchedEngine()
    assert await rig.infer(batch_id, second, policy=AT_ONCE) is None
    assert second.asked == [], "every answer was in the journal"


def refuse(error: BatchError) -> Callable[..., None]:
    def refused(*_args: object, **_options: object) -> None:
        raise error

    return refused


@pytest.mark.parametrize("reason", StopReason)
@pytest.mark.parametrize("started", [False, True])
async def test_a_paused_batch_is_cancelled_and_expires(rig: Rig, reason: StopReason, started: bool) -> None:
    batch_id = rig.start(8, chunk_size=4)
    engine = WatchedEngine(holds=lambda line: line == 3, window=1)
    said: list[str] = []
    if started:
        run = asyncio.create_task(rig.infer(batch_id, engine, policy=AT_ONCE, said=said))
        await until(lambda: engine.in_flight == {3})
        rig.store.pauses.put(operator(batch_id))
        await until(lambda: any("no new line is sent" in sentence for sentence in said))
        engine.release()
        assert await run == operator(batch_id)
    rig.store.pauses.put(operator(batch_id))
    if reason is StopReason.CANCELLED:
        rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    else:
        rig.clock.advance(DAY)
    rig.merge(batch_id)
    answered = 4 if started else 0
    assert rig.batch(batch_id).status.value == reason.value.removeprefix("batch_")
    assert rig.batch(batch_id).counts == RequestCounts(8, answered, 8 - answered)
    assert ids(rig.output(batch_id)) == id_range(answered)
    assert {row["error"]["code"] for row in rig.errors(batch_id)} == {reason.value}


async def test_a_cancel_is_heard_by_a_run_that_waits_out_a_pause(rig: Rig) -> None:
    batch_id = rig.start(8)
    engine = WatchedEngine(holds=lambda line: line == 3, window=1)
    said: list[str] = []
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=PATIENT, said=said))
    await until(lambda: engine.in_flight == {3})
    rig.store.pauses.put(operator())
    await until(lambda: any("no new line is sent" in sentence for sentence in said))
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    assert await run is StopReason.CANCELLED
    assert not engine.in_flight
    assert rig.batch(batch_id).status is BatchStatus.CANCELLING
