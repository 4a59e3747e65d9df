"""The window of a run: what is sent and not yet durable, which is all that a death can cost."""

import asyncio
from dataclasses import replace

import pytest

from tests.unit.conftest import FAST, Rig, WatchedEngine
from vllm_batch_dagster.stages.flight import Flight

SLOW_COMMITS = replace(FAST, commit_seconds=60, commit_records=10_000)


@pytest.mark.parametrize("window", [1, 2, 8])
async def test_a_death_never_costs_more_than_the_window(rig: Rig, window: int) -> None:
    """At every request: what was sent so far and is not in a journal by then. The clock of commits is out of play."""
    batch_id = rig.start(60, chunk_size=20)
    at_risk = []

    def look(_line: int) -> bool:
        durable = sum(len(rig.journal(batch_id, chunk, 1)) for chunk in range(3))
        at_risk.append(len(engine.requests) - durable)
        return False

    engine = WatchedEngine(holds=look, window=window)
    await rig.infer(batch_id, engine, policy=SLOW_COMMITS)
    assert len(engine.requests) == 60
    assert max(at_risk) <= window


async def test_a_place_is_free_again_when_its_answer_is_durable() -> None:
    flight = Flight(2)
    await flight.take_off()
    await flight.take_off()
    third = asyncio.ensure_future(flight.take_off())
    assert flight.land(chunk=0), "half of the window waits for a commit"
    await asyncio.sleep(0)
    assert not third.done()
    flight.release(flight.landed(chunk=0))
    await third
    assert flight.landed(chunk=0) == 0
