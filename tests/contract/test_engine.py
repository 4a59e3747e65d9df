"""What every engine does: the one in memory, servers of somebody else, and our own, both over HTTP with real processes.

The same behaviour on real vLLM: tests/e2e/test_engine_manager.py.
"""

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_batch_dagster.adapters.engine import client, connect_engines, engine_status, manage_engine, stop_engine
from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.adapters.engine.server import Pace
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.adapters.simulated import (
    Faults,
    SimulatedProcess,
    import_path,
    set_faults,
    simulated_command,
)
from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import EngineAnswer, EngineLease, EngineManager, EngineRequest

CHAT = "/v1/chat/completions"
SEQUENCES = 8
HEALTH_SECONDS = 0.4
STALL_SECONDS = 1.5
# How long an answer of /health may take. An engine that has no time on a busy machine must not count as dead; only of
# one whose /health is frozen is the end of it awaited.
PROBE_SECONDS, FROZEN_PROBE_SECONDS = 30.0, 3.0
START_SECONDS = 120
SERVER_KEEPALIVE_SECONDS = 5.0
LONG_PREFILL_SECONDS = 600.0  # nobody waits for its end


@dataclass
class Rig:
    """An engine under test, and what the test may do to it from outside."""

    manager: EngineManager
    model: Model
    said: list[str]
    witness: Path
    port: Callable[[], int]
    revive: Callable[[], None]

    def lease(self) -> Any:
        return self.manager.lease(self.model, self.said.append)

    def fail(self, **faults: Any) -> None:
        set_faults(self.port(), Faults(**faults))

    def received(self) -> list[str]:
        return self.witness.read_text().split()

    def starts(self) -> int:
        return sum(sentence.startswith("starting the engine") for sentence in self.said)


def a_request(number: int = 0, endpoint: str = CHAT, **fields: Any) -> EngineRequest:
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"question {number}"}], **fields}
    return EngineRequest(endpoint, json.dumps(body).encode(), f"request-{number}", number)


def reached(answers: list[Any]) -> list[EngineAnswer]:
    return [answer for answer in answers if isinstance(answer, EngineAnswer)]


async def send_all(lease: EngineLease, numbers: range) -> list[Any]:
    return await asyncio.gather(*(lease.send(a_request(number)) for number in numbers), return_exceptions=True)


@pytest.fixture(autouse=True)
def _probe_patiently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "probe_seconds", PROBE_SECONDS)


@pytest.fixture(params=["connected", "managed"])
def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """An engine over HTTP."""
    yield from (_connected(tmp_path) if request.param == "connected" else _managed(tmp_path, monkeypatch))


def _connected(tmp_path: Path) -> Iterator[Rig]:
    witness = tmp_path / "witness"
    options = ("--model", "tiny", "small", "--max-num-seqs", str(SEQUENCES), "--latency", "0.01")
    with SimulatedProcess(*options, witness=witness) as server:
        manager = connect_engines(
            server.url,
            "",
            SEQUENCES,
            start_seconds=START_SECONDS,
            stall_seconds=STALL_SECONDS,
            health_seconds=HEALTH_SECONDS,
        )

        def revive() -> None:
            server.kill()
            server.start()

        yield Rig(manager, Model("tiny", "somewhere"), [], witness, lambda: server.port, revive)


def _managed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setenv("PYTHONPATH", import_path())
    folder, witness = tmp_path / "engine", tmp_path / "witness"
    config = EngineConfig(
        folder=folder,
        python=sys.executable,
        device="cpu",
        port=0,
        start_seconds=START_SECONDS,
        stall_seconds=STALL_SECONDS,
        max_num_seqs=SEQUENCES,
        command=simulated_command("--witness", str(witness), "--latency", "0.01"),
        health_seconds=HEALTH_SECONDS,
    )

    def port() -> int:
        status = engine_status(folder)
        assert status is not None
        return int(status.url.rpartition(":")[2])

    yield Rig(manage_engine(config), Model("tiny", "somewhere", aliases=("small",)), [], witness, port, lambda: None)
    stop_engine(folder)


@pytest.fixture(params=["memory", "connected", "managed"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineManager]:
    """Any engine."""
    if request.param == "memory":
        yield EchoEngine(window=2 * SEQUENCES)
        return
    makers = {"connected": lambda: _connected(tmp_path), "managed": lambda: _managed(tmp_path, monkeypatch)}
    for rig in makers[request.param]():
        yield rig.manager


async def test_answers_lines_and_refuses_bad_ones(manager: EngineManager) -> None:
    async with manager.lease(Model("tiny", "somewhere", aliases=("small",)), lambda _: None) as lease:
        assert lease.window == 2 * SEQUENCES
        good = await lease.send(a_request(1))
        bad = await lease.send(a_request(2, temperature=-1))
        unknown = await lease.send(a_request(3, model="other"))
        alias = await lease.send(a_request(4, model="small"))
        await lease.recover()
    assert (good.status, good.request_id) == (200, "request-1")
    assert json.loads(good.body)["choices"][0]["finish_reason"] == "stop"
    assert (bad.status, json.loads(bad.body)["error"]["param"]) == (400, "temperature")
    assert unknown.status == 404
    assert json.loads(alias.body)["model"] == "tiny"


async def test_two_leases_share_the_engine(manager: EngineManager) -> None:
    model = Model("tiny", "somewhere", aliases=("small",))
    async with manager.lease(model, lambda _: None) as first, manager.lease(model, lambda _: None) as second:
        assert manager.stop_idle(0) is None
        answers = await asyncio.gather(*(lease.send(a_request(n)) for n in range(20) for lease in (first, second)))
    assert [answer.request_id for answer in answers] == [f"request-{n}" for n in range(20) for _ in "ab"]


async def test_the_bytes_of_the_engine_arrive_untouched(rig: Rig) -> None:
    request = a_request(7, messages=[{"role": "user", "content": "ünï  \u2028 code"}])
    async with rig.lease() as lease:
        answer = await lease.send(request)
        with socket.create_connection(("127.0.0.1", rig.port())) as plain:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nX-Request-Id: request-7\r\nConnection: close\r\n"
            plain.sendall(f"{head}Content-Length: {len(request.body)}\r\n\r\n".encode() + request.body)
            raw = b"".join(iter(lambda: plain.recv(65536), b""))
    assert raw.partition(b"\r\n\r\n")[2] == answer.body


async def test_death_ends_everything_in_flight_and_is_recovered_from(rig: Rig) -> None:
    async with rig.lease() as lease:
        rig.fail(die_after=20)
        answers = await send_all(lease, range(60))
        lost = [answer for answer in answers if not isinstance(answer, EngineAnswer)]
        assert lost
        assert all(isinstance(error, EngineUnavailable) for error in lost)
        rig.revive()
        before = rig.starts()
        await asyncio.gather(*(lease.recover() for _ in lost))
        again = await send_all(lease, range(60, 90))
    assert [answer.status for answer in reached(again)] == [200] * 30
    assert rig.starts() - before in (0, 1)


async def test_an_answer_of_a_dead_core_is_none(rig: Rig) -> None:
    async with rig.lease() as lease:
        rig.fail(core_dies_after=0)
        answers = await send_all(lease, range(16))
        assert [type(answer) for answer in answers] == [EngineUnavailable] * 16
        rig.revive()
        await lease.recover()
        assert (await lease.send(a_request(99))).status == 200


@pytest.mark.parametrize("is_health_frozen", [False, True])
async def test_a_hang_is_found_out(rig: Rig, is_health_frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_health_frozen:
        monkeypatch.setattr(Pace, "probe_seconds", FROZEN_PROBE_SECONDS)
    async with rig.lease() as lease:
        assert (await lease.send(a_request(0))).status == 200
        rig.fail(hang_after=0, hang_without_health=is_health_frozen)
        answers = await asyncio.wait_for(send_all(lease, range(1, 20)), 120)
        assert [type(answer) for answer in answers] == [EngineUnavailable] * 19
        rig.revive()
        await lease.recover()
        assert (await lease.send(a_request(99))).status == 200


@pytest.mark.parametrize("code", [0, 3])
async def test_an_engine_that_ends_by_itself_is_started_again(rig: Rig, code: int) -> None:
    """Its exit code says nothing: vLLM ends with 0 when its core has died."""
    async with rig.lease() as lease:
        rig.fail(exit_after=0, exit_code=code)
        answers = await send_all(lease, range(4))
        assert [type(answer) for answer in answers] == [EngineUnavailable] * 4
        rig.revive()
        await lease.recover()
        assert (await lease.send(a_request(99))).status == 200


async def test_an_engine_that_fails_everybody_is_sick(rig: Rig) -> None:
    """It says that it is healthy, and answers 500 to whatever it is asked: no line may be charged for all of it."""
    async with rig.lease() as lease:
        rig.fail(is_sick=True)
        answers = await send_all(lease, range(40))
        assert len(reached(answers)) < 16
        assert all(isinstance(answer, EngineAnswer | EngineUnavailable) for answer in answers)
        rig.revive()
        await lease.recover()
        assert (await lease.send(a_request(99))).status == 200


async def test_lines_that_fail_among_others_are_no_sickness(rig: Rig) -> None:
    async with rig.lease() as lease:
        for number in range(20):
            rig.fail(fail_next=1)
            assert (await lease.send(a_request(number))).status == 500
            assert (await lease.send(a_request(number))).status == 200
        for _ in range(20):
            rig.fail(fail_next=1)
            assert (await lease.send(a_request(1))).status == 500, "one line, again and again"
    assert rig.starts() <= 1


async def test_a_long_prefill_is_no_hang(rig: Rig) -> None:
    """No token is counted before a prompt has been read; the KV cache fills meanwhile."""
    async with rig.lease() as lease:
        rig.fail(prefill_next=1, prefill_seconds=2 * STALL_SECONDS)
        answer = await lease.send(a_request(1))
    assert answer.status == 200
    assert answer.seconds > STALL_SECONDS


async def test_an_idle_engine_is_no_hang(rig: Rig) -> None:
    async with rig.lease() as lease:
        await lease.send(a_request(0))
        await asyncio.sleep(1.5 * STALL_SECONDS)
        assert (await lease.send(a_request(1))).status == 200
        assert rig.starts() <= 1


async def test_sockets_that_the_server_has_just_closed_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keep-alive race: the server closes them while our loop is busy, and they are in the pool when it goes on.

    aiohttp gives a new connection no longer than that to send its first request, and this process may have no time.
    """
    monkeypatch.setattr(client, "_KEEPALIVE_SECONDS", 4 * SERVER_KEEPALIVE_SECONDS)
    options = ("--model", "tiny", "--keep-alive", str(SERVER_KEEPALIVE_SECONDS), "--latency", "0.01")
    witness = tmp_path / "witness"
    with SimulatedProcess(*options, witness=witness) as server:
        async with connect_engines(server.url).lease(Model("tiny", "somewhere"), lambda _: None) as lease:
            for burst in range(3):
                if burst:
                    time.sleep(SERVER_KEEPALIVE_SECONDS + 1)  # noqa: ASYNC251  # what is tested: a loop that does not look
                answers = await send_all(lease, range(burst * 40, burst * 40 + 40))
                assert [answer.status for answer in reached(answers)] == [200] * 40
    assert sorted(witness.read_text().split()) == sorted(f"request-{number}" for number in range(120))


async def test_a_slow_engine_does_not_hang(rig: Rig) -> None:
    """It works for longer than the stall limit in all, and answers something at every look."""
    async with rig.lease() as lease:
        began = time.monotonic()
        for number in range(12):
            await asyncio.sleep(STALL_SECONDS / 8)
            answers = await send_all(lease, range(number * 4, number * 4 + 4))
            assert len(reached(answers)) == 4
        assert time.monotonic() - began > STALL_SECONDS


async def test_a_broken_connection_leaves_the_engine_alone(rig: Rig) -> None:
    async with rig.lease() as lease:
        await lease.send(a_request(0))
        rig.fail(cut_next=1)
        with pytest.raises(EngineUnavailable):
            await lease.send(a_request(1))
        starts = rig.starts()
        await lease.recover()
        assert (await lease.send(a_request(1))).status == 200
    assert rig.starts() == starts
    assert rig.received() == ["request-0", "request-1", "request-1"]


async def test_faults_of_one_request_are_answers(rig: Rig) -> None:
    async with rig.lease() as lease:
        rig.fail(fail_next=1)
        assert (await lease.send(a_request(1))).status == 500
        rig.fail(busy_next=1)
        assert (await lease.send(a_request(2))).status == 503
        rig.fail(abort_next=1)
        aborted = await lease.send(a_request(3))
    assert (aborted.status, json.loads(aborted.body)["choices"][0]["finish_reason"]) == (200, "abort")


async def test_it_gives_up_on_a_request_that_kills_every_engine(rig: Rig) -> None:
    async def send_until_it_fails(lease: EngineLease) -> int:
        tries = 0
        while True:
            tries += 1
            rig.fail(poison="mandrake")
            with pytest.raises(EngineUnavailable):
                await lease.send(a_request(0, user="mandrake"))
            rig.revive()
            try:
                await lease.recover()
            except EngineFailure as error:
                assert "3 times" in str(error)  # noqa: PT017
                return tries

    async with rig.lease() as lease:
        assert await send_until_it_fails(lease) == 4


async def until_held(rig: Rig, count: int) -> None:
    """Wait until the engine has so many requests, running and waiting ones."""
    server = client.EngineClient(f"http://127.0.0.1:{rig.port()}")
    try:
        while (load := await server.load()) is None or load.requests < count:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    finally:
        await server.close()


async def test_urgent_lines_go_first(rig: Rig) -> None:
    """Eight at a time: while eight long ones hold the engine, 32 lines come in reverse; the most urgent overtake.

    The long ones are taken back when all the others wait.
    """
    done: list[int] = []

    async def send(lease: EngineLease, number: int) -> None:
        await lease.send(a_request(number))
        done.append(number)

    async with rig.lease() as lease:
        rig.fail(prefill_next=SEQUENCES, prefill_seconds=LONG_PREFILL_SECONDS)
        long_ones = [asyncio.create_task(lease.send(a_request(number))) for number in range(100, 100 + SEQUENCES)]
        await until_held(rig, SEQUENCES)
        urgent = [asyncio.create_task(send(lease, number)) for number in reversed(range(32))]
        await until_held(rig, SEQUENCES + len(urgent))
        for task in long_ones:
            task.cancel()
        await asyncio.gather(*urgent)
    assert sum(done[:16]) < sum(done[-16:])


async def test_an_engine_that_was_warmed_is_the_one_that_serves(manager: EngineManager) -> None:
    said: list[str] = []
    tiny = Model("tiny", "somewhere", aliases=("small",))
    manager.warm(tiny, said.append)
    manager.warm(tiny, said.append)
    assert len(said) <= 1, "a second call finds it on its way"
    async with manager.lease(tiny, said.append) as lease:
        manager.warm(Model("other", "elsewhere"), said.append)
        assert (await lease.send(a_request())).status == 200
    manager.warm(Model("other", "elsewhere"), said.append)
    assert not any("other" in sentence for sentence in said), "what runs is left alone"


def test_an_engine_that_cannot_be_warmed_is_only_reported(tmp_path: Path) -> None:
    said: list[str] = []
    config = EngineConfig(folder=tmp_path / "engine", python=str(tmp_path / "none"), device="cpu")
    manage_engine(config).warm(Model("tiny", "somewhere"), said.append)
    assert "was not started ahead" in said[-1]
    assert engine_status(tmp_path / "engine") is None
