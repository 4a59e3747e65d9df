"""Our own engine on real vLLM: what the simulated one imitates in tests/contract/test_engine.py.

One engine for the whole module, started by the first test, which asks for more context than its KV cache holds. The
others do to it what a machine does, and each costs a start. SIGKILL of the core and of the API server: test_batch.py.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import CHAT
from tests.stack import START_SECONDS, STOP_SECONDS, free_ports, wait_for
from vllm_batch_dagster.adapters.catalog import load_catalog
from vllm_batch_dagster.adapters.engine import engine_status, manage_engine, stop_engine
from vllm_batch_dagster.adapters.engine.client import EngineClient, Load
from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.cli.processes import is_alive
from vllm_batch_dagster.core.errors import EngineStartFailed, EngineUnavailable
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import EngineAnswer, EngineLease, EngineRequest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

STALL_SECONDS = 12.0
# 60,000 tokens of this model take 1.29 GiB, and the cache is given 1.
LENGTH = 60_000
ARGUMENTS = ("--max-model-len", str(LENGTH), "--hf-overrides", json.dumps({"max_position_embeddings": 65_536}))


class Bench:
    """The engine under test and its log sentences."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder, self.said = folder, list[str]()
        found = load_catalog(Path(settings["MODELS_FILE"])).find(CHAT)
        assert found is not None
        self.model = Model(CHAT, found.path, args=ARGUMENTS)
        self.config = EngineConfig(
            folder=folder,
            python=settings["ENGINE_PYTHON"],
            device="cpu",
            port=free_ports(1)[0],
            stall_seconds=STALL_SECONDS,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            cpu_kvcache_gib=1,
        )

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[EngineLease]:
        async with manage_engine(self.config).lease(self.model, self.said.append) as lease:
            yield lease

    def url(self) -> str:
        status = engine_status(self.folder)
        assert status is not None
        return status.url

    def processes(self) -> list[psutil.Process]:
        """The API server first, then EngineCore and the worker."""
        status = engine_status(self.folder)
        assert status is not None
        leader = psutil.Process(status.pid)
        return [leader, *leader.children(recursive=True)]

    def core(self) -> psutil.Process:
        return next(each for each in self.processes() if "EngineCore" in "".join(each.cmdline()) + each.name())

    def sockets(self) -> set[str]:
        return {path.name for path in (self.folder / "sockets").iterdir()}

    def has_said(self, words: str) -> int:
        return sum(words in sentence for sentence in self.said)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, engine_settings: dict[str, str]) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("engine"), engine_settings)
    yield bench
    stop_engine(bench.folder)


def request_of(number: int, words: int = 3, tokens: int = 8) -> EngineRequest:
    body = {
        "model": CHAT,
        "messages": [{"role": "user", "content": "word " * words}],
        "max_tokens": tokens,
        "min_tokens": tokens,
    }
    return EngineRequest("/v1/chat/completions", json.dumps(body).encode(), f"request-{number}", number)


async def watch_load(url: str, until: "asyncio.Task[EngineAnswer]") -> list[Load]:
    client, looks = EngineClient(url), list[Load]()
    try:
        while not until.done():
            if (load := await client.load()) is not None:
                looks.append(load)
            await asyncio.wait({until}, timeout=0.1)
    finally:
        await client.close()
    return looks


async def until_busy(url: str) -> None:
    """Wait until tokens are made."""
    client, seen = EngineClient(url), set[float]()
    try:
        async with asyncio.timeout(START_SECONDS):
            while len(seen) < 2:
                if (load := await client.load()) is not None and load.requests:
                    seen.add(load.tokens)
                await asyncio.sleep(0.1)
    finally:
        await client.close()


async def answers_of(lease: EngineLease, count: int, tokens: int) -> list[object]:
    sends = (lease.send(request_of(number, tokens=tokens)) for number in range(count))
    return await asyncio.gather(*sends, return_exceptions=True)


async def assert_heals(bench: Bench, lease: EngineLease, lost: list[object]) -> None:
    assert lost
    assert all(isinstance(error, EngineUnavailable) for error in lost)
    await lease.recover()
    assert (await lease.send(request_of(99))).status == 200


async def test_a_cache_that_is_too_small_is_made_larger_and_that_is_remembered(bench: Bench) -> None:
    async with bench.lease() as lease:
        assert (await lease.send(request_of(0))).status == 200
    (why,) = (sentence for sentence in bench.said if "without becoming ready" in sentence)
    assert "1.29 GiB KV cache is needed" in why
    status = engine_status(bench.folder)
    assert status is not None
    assert (status.rung, status.max_model_len) == ("VLLM_CPU_KVCACHE_SPACE 2", LENGTH)


async def test_a_prefill_moves_what_the_watchdog_looks_at(bench: Bench) -> None:
    """No token is counted before the whole prompt has been read: the use of the KV cache shows that work goes on."""
    async with bench.lease() as lease:
        sending = asyncio.create_task(lease.send(request_of(1, words=8_000, tokens=1)))
        looks = await watch_load(bench.url(), sending)
        assert (await sending).status == 200
    before = {load.kv_usage for load in looks if load.requests and load.tokens == looks[0].tokens}
    assert len(before) >= 3


async def test_a_frozen_core_is_found_by_its_counters(bench: Bench) -> None:
    async with bench.lease() as lease:
        sends = asyncio.create_task(answers_of(lease, 16, 4000))
        await until_busy(bench.url())
        frozen, sockets = bench.core(), bench.sockets()
        frozen.suspend()
        lost = [answer for answer in await sends if not isinstance(answer, EngineAnswer)]
        assert all("no token" in str(error) for error in lost)
        await assert_heals(bench, lease, lost)
        assert sockets
        assert bench.sockets().isdisjoint(sockets), "a killed engine cannot remove its own"
    wait_for(lambda: not is_alive(frozen), STOP_SECONDS)
    assert bench.has_said("without becoming ready") == 1, "the rung was remembered"


async def test_a_terminated_engine_is_started_again(bench: Bench) -> None:
    async with bench.lease() as lease:
        old = bench.processes()
        sends = asyncio.create_task(answers_of(lease, 16, 4000))
        await until_busy(bench.url())
        os.kill(old[0].pid, signal.SIGTERM)
        lost = [answer for answer in await sends if not isinstance(answer, EngineAnswer)]
        await assert_heals(bench, lease, lost)
    wait_for(lambda: not any(map(is_alive, old)), STOP_SECONDS)


async def test_what_cannot_be_helped_is_said_at_once(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NewForCausalLM"], "model_type": "llama"}')
    with pytest.raises(EngineStartFailed) as raised:
        async with manage_engine(bench.config).lease(Model("new", str(tmp_path)), bench.said.append):
            pass
    assert (raised.value.cause, raised.value.may_pass) == ("unsupported", False)
    assert "NewForCausalLM" in str(raised.value)
