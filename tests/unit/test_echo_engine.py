"""The in-memory engine, clock and catalogue: deterministic answers, faults on demand, idle stop."""

import asyncio
import json
from typing import Any

import pytest

from vllm_batch_dagster.adapters.memory import EchoEngine, Faults, FixedClock, MemoryCatalog
from vllm_batch_dagster.core.errors import EngineFailure, EngineStartFailed, EngineUnavailable
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import EngineAnswer, EngineManager, EngineRequest

MODEL = Model("tiny", "models/tiny", aliases=("small",))
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello there"}]},
    "/v1/completions": {"prompt": "Hello there"},
    "/v1/embeddings": {"input": "Hello there"},
}


def silent(_sentence: str) -> None:
    """Take no notice of a report."""


def a_request(endpoint: str = "/v1/embeddings", number: int = 0, **fields: Any) -> EngineRequest:
    body = {"model": "tiny", **BODIES.get(endpoint, {}), **fields}
    return EngineRequest(endpoint, json.dumps(body).encode(), f"batch_1-{number}")


async def ask(engine: EngineManager, *requests: EngineRequest) -> list[EngineAnswer]:
    async with engine.lease(MODEL, silent) as lease:
        return [await lease.send(request) for request in requests]


@pytest.mark.parametrize("endpoint", BODIES)
async def test_equal_requests_get_equal_answers(endpoint: str) -> None:
    first, second, third = await ask(
        EchoEngine(), a_request(endpoint), a_request(endpoint), a_request(endpoint, model="small", seed=7, input="Else")
    )
    assert first == second
    assert (first.status, first.request_id) == (200, "batch_1-0")
    body = json.loads(first.body)
    assert body["model"] == "tiny"
    assert body["usage"]["prompt_tokens"] > 0
    assert third.status == 200
    assert third.body != first.body


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (a_request("/v1/chat/completions", temperature=-1), 400),
        (a_request("/v1/chat/completions", messages=[]), 400),
        (a_request(model="other"), 404),
        (a_request("/v1/nothing"), 404),
        (EngineRequest("/v1/embeddings", b"{", "r"), 400),
        (EngineRequest("/v1/embeddings", b"[]", "r"), 400),
    ],
)
async def test_a_wrong_request_gets_an_error_answer(request_: EngineRequest, status: int) -> None:
    (answer,) = await ask(EchoEngine(), request_)
    assert answer.status == status
    assert json.loads(answer.body)["error"]["code"] == status


async def test_too_long_a_prompt_is_refused() -> None:
    (answer,) = await ask(EchoEngine(max_model_len=3), a_request("/v1/completions", prompt="one two three four"))
    assert answer.status == 400
    assert b"maximum context length is 3" in answer.body


async def test_faults_decide_first() -> None:
    busy = EngineAnswer(503, b"{}", "", 0.0)
    outcomes: list[EngineAnswer | Exception | None] = [busy, EngineUnavailable("gone"), None]
    seen: list[str] = []

    def faults(request: EngineRequest) -> EngineAnswer | Exception | None:
        seen.append(request.request_id)
        return outcomes[len(seen) - 1]

    hook: Faults = faults
    async with EchoEngine(hook).lease(MODEL, silent) as lease:
        assert await lease.send(a_request(number=1)) is busy
        with pytest.raises(EngineUnavailable, match="gone"):
            await lease.send(a_request(number=2))
        assert (await lease.send(a_request(number=3))).status == 200
    assert seen == ["batch_1-1", "batch_1-2", "batch_1-3"]


async def test_many_callers_share_one_recovery() -> None:
    engine = EchoEngine()
    async with engine.lease(MODEL, silent) as lease:
        await asyncio.gather(*(lease.recover() for _ in range(10)))
        assert engine.recoveries == 1
        await lease.recover()
        assert engine.recoveries == 2


async def test_a_recovery_can_fail() -> None:
    def refuse() -> None:
        raise EngineStartFailed("out of memory")

    async with EchoEngine(on_recover=refuse).lease(MODEL, silent) as lease:
        for outcome in await asyncio.gather(lease.recover(), lease.recover(), return_exceptions=True):
            assert isinstance(outcome, EngineFailure)


async def test_the_window_and_the_report() -> None:
    said: list[str] = []
    engine = EchoEngine(window=3)
    for _ in range(2):
        async with engine.lease(MODEL, said.append) as lease:
            assert lease.window == 3
    assert (len(said), engine.leases) == (1, 2)
    assert "tiny" in said[0]


async def test_only_an_idle_engine_is_stopped() -> None:
    clock = FixedClock()
    engine = EchoEngine(clock=clock)
    assert engine.stop_idle(0) is None
    async with engine.lease(MODEL, silent):
        clock.advance(100)
        assert engine.stop_idle(10) is None
    clock.advance(9)
    assert engine.stop_idle(10) is None
    clock.advance(1)
    assert engine.stop_idle(10) == "tiny"
    assert engine.stop_idle(0) is None


def test_a_fixed_clock_moves_when_told() -> None:
    clock = FixedClock(50.0)
    clock.advance(1.5)
    assert (clock(), clock()) == (51.5, 51.5)


def test_a_memory_catalogue_knows_every_name() -> None:
    catalog = MemoryCatalog([MODEL])
    assert catalog.find("tiny") is catalog.find("small") is MODEL
    assert catalog.find("other") is None
    assert list(catalog.all()) == [MODEL]
