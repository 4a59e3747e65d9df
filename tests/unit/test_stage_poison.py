"""Lines that kill the engine, through a whole run on an engine that really loses what it had in flight."""

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.conftest import FAST, Rig, WatchedEngine, answer_of, id_range, ids, line_of, until
from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable
from vllm_batch_dagster.core.models import Model, RequestCounts
from vllm_batch_dagster.core.poison import MOST_BARREN, SuspectRecord
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest
from vllm_batch_dagster.core.states import BatchStatus

ALONE = replace(FAST, chunk_attempts=1)


class Mortal(WatchedEngine):
    """Dies when it comes to a line of `poison`, with everything that it has in flight; `at_death` is called then."""

    def __init__(self, poison: Collection[int], *, seed: int = 0, **options: Any) -> None:
        super().__init__(on_recover=self._revive, **options)
        self.poison, self.chance = frozenset(poison), random.Random(seed)
        self.deaths = 0
        self.sent: list[int] = []
        self.answered: Counter[int] = Counter()
        self.at_death = lambda: None
        self.kill_at: list[int] = []
        self._life = asyncio.Event()

    def kill(self) -> None:
        self.deaths += 1
        self._life.set()
        self.at_death()

    def _revive(self) -> None:
        if self._life.is_set():
            self._life = asyncio.Event()

    async def answer(self, model: Model, request: EngineRequest) -> EngineAnswer:
        life, line = self._life, line_of(request)
        self.sent.append(line)
        if life.is_set():
            raise EngineUnavailable("connection refused", was_sent=False)
        work = asyncio.ensure_future(self._work(model, request, life, line))
        end = asyncio.ensure_future(life.wait())
        try:
            await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise EngineUnavailable("connection reset")
            self.answered[line] += 1
            return work.result()
        finally:
            work.cancel()
            end.cancel()

    async def _work(self, model: Model, request: EngineRequest, life: asyncio.Event, line: int) -> EngineAnswer:
        for _ in range(self.chance.randrange(6)):
            await asyncio.sleep(0)
        is_killed = bool(self.kill_at) and sum(self.answered.values()) >= self.kill_at[0]
        if is_killed:
            self.kill_at.pop(0)
        if not life.is_set() and (line in self.poison or is_killed):
            self.kill()
        if life.is_set():
            await asyncio.sleep(3600)
        return await super().answer(model, request)


def merged(rig: Rig, batch_id: str) -> tuple[list[str], list[str]]:
    rig.merge(batch_id)
    assert rig.batch(batch_id).status is BatchStatus.COMPLETED
    return ids(rig.output(batch_id)), ids(rig.errors(batch_id))


def assert_isolated(rig: Rig, batch_id: str, engine: Mortal, total: int) -> None:
    """Every poison line stands in the error file with its reason; every other one was answered exactly once."""
    output, errors = merged(rig, batch_id)
    assert errors == [f"id-{line}" for line in sorted(engine.poison)]
    assert output == [name for name in id_range(total) if name not in errors]
    assert {(row["response"], row["error"]["code"]) for row in rig.errors(batch_id)} == {(None, "engine_crashed")}
    assert engine.answered == Counter(dict.fromkeys(set(range(total)) - engine.poison, 1))
    assert not rig.workspace.suspects_path(batch_id).exists()


@given(st.data())
@settings(max_examples=40)
def test_every_poison_line_is_isolated_and_the_rest_answered_once(data: st.DataObject) -> None:
    total, window = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 32))
    poison = data.draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=3))
    seed, size = data.draw(st.integers(0, 1 << 16)), data.draw(st.integers(1, 30))

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            rig = Rig(Path(folder))
            batch_id = rig.start(total, chunk_size=max(size, total // 40 + 1))
            engine = Mortal(poison, seed=seed, window=window)
            await rig.infer(batch_id, engine, policy=ALONE)
            assert_isolated(rig, batch_id, engine, total)
            assert engine.deaths <= len(poison) * (window.bit_length() + 5)

    asyncio.run(run())


async def test_the_error_line_says_what_was_seen(rig: Rig) -> None:
    batch_id = rig.start(20, chunk_size=10)
    await rig.infer(batch_id, Mortal({7}, window=8))
    rig.merge(batch_id)
    (row,) = rig.errors(batch_id)
    assert row["custom_id"] == "id-7"
    assert "deaths of the engine, at 3 of them alone" in row["error"]["message"]
    assert "Last death: the echo engine was told to die" in row["error"]["message"]
    chunk = rig.store.chunks.get(batch_id, 0)
    assert chunk.summary is not None
    assert (chunk.summary.counts, chunk.summary.error_codes) == (RequestCounts(10, 9, 1), {"engine_crashed": 1})


async def test_a_death_from_outside_costs_what_was_in_flight(rig: Rig) -> None:
    batch_id = rig.start(100, chunk_size=50)
    engine = Mortal((), window=16)
    engine.kill_at = [30]
    await rig.infer(batch_id, engine)
    assert merged(rig, batch_id) == (id_range(100), [])
    assert engine.deaths == 1
    assert len(engine.sent) <= 100 + 16
    assert engine.answered == Counter(dict.fromkeys(range(100), 1))


async def test_deaths_from_outside_condemn_nobody_while_lines_are_searched(rig: Rig) -> None:
    batch_id = rig.start(100, chunk_size=50)
    engine = Mortal({42}, window=16, seed=3)
    engine.kill_at = [10, 10, 11, 30, 43, 44, 60, 60, 60, 90]
    await rig.infer(batch_id, engine)
    assert_isolated(rig, batch_id, engine, 100)


async def test_an_engine_that_dies_of_everything_is_no_lines_fault(rig: Rig) -> None:
    batch_id = rig.start(40, chunk_size=20)
    engine = Mortal(range(40), window=16)
    with pytest.raises(EngineFailure, match="whatever it was given"):
        await rig.infer(batch_id, engine)
    assert engine.deaths <= MOST_BARREN
    assert not rig.workspace.suspects_path(batch_id).exists()
    await rig.infer(batch_id, WatchedEngine())
    assert merged(rig, batch_id) == (id_range(40), [])


async def test_a_line_that_is_only_refused_is_no_poison(rig: Rig) -> None:
    batch_id = rig.start(10)
    broken = answer_of(b'{"error":{"message":"no","type":"InternalServerError"}}', 500)
    engine = WatchedEngine(lambda request: broken if line_of(request) == 3 else None)
    await rig.infer(batch_id, engine)
    rig.merge(batch_id)
    (row,) = rig.errors(batch_id)
    assert (row["response"]["status_code"], engine.recoveries) == (500, 0)


async def test_suspicion_outlives_a_run_whose_engine_does_not_come_back(rig: Rig) -> None:
    """Each run sees one death: what it learned of the lines is on disk for the next one."""
    batch_id = rig.start(32, chunk_size=32)
    poison, deaths, runs = {11}, 0, 0
    answered: Counter[int] = Counter()
    while not rig.store.chunks.get(batch_id, 0).is_published:
        runs += 1
        engine = Mortal(poison, window=16)

        def no_restart() -> None:
            raise EngineFailure("it does not come back")

        engine._on_recover = no_restart
        try:
            await rig.infer(batch_id, engine, policy=replace(FAST, chunk_attempts=100))
        except EngineFailure:
            assert rig.workspace.suspects_path(batch_id).exists()
        deaths += engine.deaths
        answered.update(engine.answered)
        assert runs < 20
    assert merged(rig, batch_id) == ([name for name in id_range(32) if name != "id-11"], ["id-11"])
    assert deaths <= 9
    assert answered == Counter(dict.fromkeys(set(range(32)) - poison, 1))


async def test_a_line_that_takes_the_machine_down_is_found(rig: Rig) -> None:
    """Nobody is left to note a death: the run and its engine are gone at once, again and again."""
    batch_id = rig.start(24, chunk_size=24)
    suspects, runs = rig.workspace.suspects_path(batch_id), 0
    while not rig.store.chunks.get(batch_id, 0).is_published:
        runs += 1
        assert runs < 30
        engine = Mortal({5}, window=8, seed=runs)
        run = asyncio.ensure_future(rig.infer(batch_id, engine))
        disk: list[bytes] = []
        engine.at_death = lambda disk=disk, run=run: (disk.append(suspects.read_bytes()), run.cancel())
        await asyncio.wait([run])
        if disk:  # what an orderly end has written since is not what a killed run leaves
            suspects.write_bytes(disk[0])
    output, errors = merged(rig, batch_id)
    assert (len(output), errors) == (23, ["id-5"])
    assert runs <= 12


async def test_a_run_that_was_killed_once_leaves_no_suspicion(rig: Rig) -> None:
    batch_id = rig.start(24, chunk_size=24)
    suspects = rig.workspace.suspects_path(batch_id)
    suspects.write_bytes(msgspec.json.encode(SuspectRecord(is_running=True)))
    engine = WatchedEngine(holds=lambda line: line == 0, window=8)
    run = asyncio.ensure_future(rig.infer(batch_id, engine))
    await until(lambda: len(engine.asked) == 24)  # all others pass by the one that is kept
    engine.release()
    await run
    assert not suspects.exists()


async def test_what_cannot_be_read_is_no_suspicion(rig: Rig) -> None:
    batch_id = rig.start(5)
    rig.workspace.suspects_path(batch_id).write_bytes(b"{torn")
    await rig.infer(batch_id, WatchedEngine())
    assert merged(rig, batch_id) == (id_range(5), [])


async def test_one_in_two_thousand_at_a_window_of_256(rig: Rig, record_property: Any) -> None:
    batch_id = rig.start(2000, chunk_size=500)
    engine = Mortal({777}, window=256)
    await rig.infer(batch_id, engine)
    again = len(engine.sent) - 2000
    record_property("deaths", engine.deaths)
    record_property("sent_again", again)
    assert_isolated(rig, batch_id, engine, 2000)
    assert engine.deaths <= 12
    assert again <= 3 * 256 + 2 * engine.deaths
