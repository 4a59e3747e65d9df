"""The inference stage while it waits: for an engine that starts, for a store that is away, for better answers."""

import asyncio
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import pytest

from tests.unit.conftest import FAST, Reply, Rig, WatchedEngine, id_range, ids, line_of, until
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable, StorageFailure
from vllm_batch_dagster.core.models import Batch, Model, RequestCounts, StopReason
from vllm_batch_dagster.core.pauses import Pause, PauseCause
from vllm_batch_dagster.core.ports import EngineLease, EngineRequest, Report
from vllm_batch_dagster.core.states import BatchEvent


class SlowEngine(EchoEngine):
    """Starts for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.is_starting = False

    def lease(self, model: Model, report: Report) -> AbstractAsyncContextManager[EngineLease]:
        return self._wait()

    @asynccontextmanager
    async def _wait(self):  # type: ignore[no-untyped-def]
        self.is_starting = True
        await asyncio.Event().wait()
        yield


def fail_to_restart() -> None:
    raise EngineFailure("gone")


async def test_a_cancel_is_heard_while_the_engine_starts(rig: Rig) -> None:
    batch_id, engine = rig.start(5), SlowEngine()
    run = asyncio.create_task(rig.infer(batch_id, engine))
    await until(lambda: engine.is_starting)
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    async with asyncio.timeout(50):
        assert await run is StopReason.CANCELLED
    assert rig.merge(batch_id).counts == RequestCounts(5, 0, 5)


async def test_a_store_that_is_away_for_a_moment_costs_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id, engine = rig.start(5), WatchedEngine(holds=lambda line: line == 4)
    ask, misses = rig.store.batches.get, 0

    def get(wanted: str) -> Batch:
        nonlocal misses
        if misses < 5 and len(engine.requests) == 5:
            misses += 1
            raise StorageFailure("the database restarts")
        return ask(wanted)

    monkeypatch.setattr(rig.store.batches, "get", get)
    run = asyncio.create_task(rig.infer(batch_id, engine))
    await until(lambda: misses == 5)
    engine.release()
    assert await run is None
    assert sorted(engine.asked) == [0, 1, 2, 3, 4]


async def test_a_store_that_stays_away_pauses_the_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id, engine = rig.start(5), WatchedEngine(holds=lambda _line: True)
    ask = rig.store.batches.get

    def get(wanted: str) -> Batch:
        if engine.requests:
            raise StorageFailure("the database is gone")
        return ask(wanted)

    monkeypatch.setattr(rig.store.batches, "get", get)
    paused = await rig.infer(batch_id, engine, policy=replace(FAST, lost_polls=3))
    assert isinstance(paused, Pause)
    assert (paused.cause, paused.reason) == (PauseCause.STORAGE, "the database is gone")
    assert not engine.in_flight


async def test_a_failure_is_charged_only_to_the_chunks_at_work(rig: Rig) -> None:
    batch_id = rig.start(20, chunk_size=5)

    def faults(request: EngineRequest) -> Reply:
        return EngineUnavailable("reset") if line_of(request) >= 2 else None

    engine = WatchedEngine(faults, window=1, on_recover=fail_to_restart)
    with pytest.raises(EngineFailure):
        await rig.infer(batch_id, engine, policy=replace(FAST, chunk_attempts=1))
    chunks = rig.store.chunks.list(batch_id)
    assert [chunk.is_published for chunk in chunks] == [True, False, False, False]
    assert [chunk.engine_failures for chunk in chunks[1:]] == [0, 0, 0]
    await rig.infer(batch_id, EchoEngine())
    assert rig.merge(batch_id).counts == RequestCounts(20, 17, 3)


async def test_a_failed_rerun_leaves_the_good_result(rig: Rig) -> None:
    batch_id = rig.start(5)
    await rig.infer(batch_id, EchoEngine())
    rig.merge(batch_id)

    def faults(_request: EngineRequest) -> Reply:
        return EngineUnavailable("reset")

    engine = WatchedEngine(faults, on_recover=fail_to_restart)
    with pytest.raises(EngineFailure):
        await rig.infer(batch_id, engine, only={0}, fresh={0}, policy=replace(FAST, chunk_attempts=1))
    assert not rig.batch(batch_id).is_stale
    assert rig.merge(batch_id).counts == RequestCounts(5, 5, 0)
    assert ids(rig.output(batch_id)) == id_range(5)
