"""The estimate of the run time against histories whose truth is known."""

import random

import pytest

from vllm_batch_dagster.core.models import Chunk, ChunkRange, ChunkSummary, RequestCounts, Usage
from vllm_batch_dagster.core.preflight import (
    Measurement,
    ModelLoad,
    Observation,
    Workload,
    describe_run_time,
    estimate_run_time,
    observe_chunks,
)


def chunk(batch: str, begin: float, end: float, *, lines: int = 100, output: int = 5000, tokens: int = 8000) -> Chunk:
    summary = ChunkSummary(
        RequestCounts(lines, lines, 0),
        Usage(input_tokens=tokens - output, output_tokens=output),
        first_sent_at=begin,
        last_answer_at=end,
        sent=lines,
        sent_tokens=tokens,
        latency_p50=2.0,
    )
    return Chunk(batch, ChunkRange(0, 0, lines, 0, 1), epoch=1, base_epoch=1, published_epoch=1, summary=summary)


def test_without_history_there_is_no_estimate() -> None:
    assert estimate_run_time(Workload(10, 100), ()) is None
    assert observe_chunks([Chunk("b", ChunkRange(0, 0, 1, 0, 1))]) == []


def test_a_steady_engine_is_predicted_exactly() -> None:
    history = observe_chunks(chunk(f"b{number}", 0.0, 80.0) for number in range(10))
    # 100 tokens a second, 50 written per line: 400 lines with 12000 input tokens are 32000 tokens.
    time = estimate_run_time(Workload(400, 12_000), history)
    assert time is not None
    assert (time.seconds, time.low, time.high, time.chunks) == (320.0, 320.0, 320.0, 10)


def test_lines_that_may_write_less_than_the_past_take_less() -> None:
    history = observe_chunks(chunk(f"b{number}", 0.0, 80.0) for number in range(10))
    time = estimate_run_time(Workload(400, 12_000, output_cap=10.0), history)
    assert time is not None
    assert time.seconds == 160.0


def test_chunks_that_ran_side_by_side_do_not_make_the_engine_look_slow() -> None:
    together = observe_chunks([chunk("b", 0.0, 80.0), chunk("b", 0.0, 80.0)])
    assert [seen.seconds for seen in together] == [40.0, 40.0]


def test_nothing_is_faster_than_one_request() -> None:
    time = estimate_run_time(Workload(1, 10), [Observation(8000, 80.0, 0.0, 2.0)] * 6)
    assert time is not None
    assert time.seconds == 2.0


def test_a_short_history_widens_the_interval() -> None:
    time = estimate_run_time(
        Workload(100, 1000), [Observation(1000, 10.0, 0.0, 0.0), Observation(1000, 20.0, 0.0, 0.0)]
    )
    assert time is not None
    assert (time.low, time.high) == (10.0 / 1.5, 30.0)
    assert "only 2 finished chunks" in describe_run_time(measured(time))


def test_a_real_batch_outvotes_many_trials() -> None:
    history = [Observation(100, 100.0, 0.0, 0.0)] * 20 + [Observation(100_000, 1000.0, 0.0, 0.0)] * 5
    time = estimate_run_time(Workload(100, 1000), history)
    assert time is not None
    assert time.seconds == 10.0


def test_the_interval_holds_most_of_what_follows() -> None:
    chance = random.Random(7)

    def draw() -> Observation:
        return Observation(10_000, 10_000 / chance.lognormvariate(7.0, 0.3), 50.0, 0.0)

    time = estimate_run_time(Workload(100, 5000), [draw() for _ in range(100)])
    assert time is not None
    seconds = [10_000 / chance.lognormvariate(7.0, 0.3) for _ in range(1000)]
    inside = sum(time.low <= value <= time.high for value in seconds)
    assert 700 < inside < 900
    assert time.low < time.seconds < time.high


@pytest.mark.parametrize("known", [True, False])
def test_several_models_run_one_after_the_other(known: bool) -> None:
    history = observe_chunks(chunk(f"b{number}", 0.0, 80.0) for number in range(10))
    one = estimate_run_time(Workload(100, 3000), history)
    loads = [load("a", one), load("b", one if known else None)]
    whole = Measurement(2, 2, 2, (), 1, tuple(loads), (), 0, 0)
    if known:
        assert whole.run_time is not None
        assert whole.run_time.seconds == 160.0
    else:
        assert whole.run_time is None
        assert "no history of b " in describe_run_time(whole)


def load(model: str, time: object) -> ModelLoad:
    return ModelLoad(model, 1, 1, True, "Counted.", None, time)  # type: ignore[arg-type]


def measured(time: object) -> Measurement:
    return Measurement(1, 1, 1, (), 1, (load("a", time),), (), 0, 0)
