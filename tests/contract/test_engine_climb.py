"""Our own engine when memory is short: a real process that writes vLLM's words into its log and ends.

The rules are in tests/unit/test_ladder.py, the same climb on real vLLM in tests/e2e/test_engine_manager.py.
"""

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.stack import wait_for
from vllm_batch_dagster.adapters.engine import EngineStatus, engine_status, manage_engine, rungs, stop_engine
from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.adapters.engine.folder import EngineFolder
from vllm_batch_dagster.adapters.engine.hardware import Hardware
from vllm_batch_dagster.adapters.simulated import Faults, import_path, set_faults, simulated_command
from vllm_batch_dagster.core.errors import EngineStartFailed, EngineUnavailable
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import EngineLease, EngineRequest

START_SECONDS = 120
TINY = Model("tiny", "somewhere")
CARD = Hardware("Some card, driver 1, 16384 MiB", free_share=0.7, host_free_gib=8.0)


def a_request(number: int = 0) -> EngineRequest:
    return EngineRequest("/v1/completions", b'{"model": "tiny", "prompt": "x"}', f"request-{number}")


@dataclass
class Machine:
    """An engine on a machine whose memory is as the test says."""

    config: EngineConfig
    monkeypatch: pytest.MonkeyPatch
    said: list[str] = field(default_factory=list)

    def start_needs(self, says: str, **needs: float) -> None:
        """From now on an engine starts only with these memory settings, and says why it does not."""
        faults = Faults(start_says=says, start_needs=needs)
        self.monkeypatch.setenv("SIMULATED_FAULTS", msgspec.json.encode(faults).decode())

    def start_needs_nothing(self) -> None:
        self.monkeypatch.delenv("SIMULATED_FAULTS")

    def has(self, hardware: Hardware) -> None:
        self.monkeypatch.setattr(rungs, "look_at_hardware", lambda _device: hardware)

    def lease(self, model: Model = TINY) -> Any:
        return manage_engine(self.config).lease(model, self.said.append)

    async def use(self, model: Model = TINY) -> EngineStatus:
        """Let an engine start and answer, and stop it."""
        async with self.lease(model) as lease:
            assert (await lease.send(a_request())).status == 200
            return self.stop()

    def stop(self) -> EngineStatus:
        status = self.status()
        stop_engine(self.config.folder)
        return status

    def status(self) -> EngineStatus:
        status = engine_status(self.config.folder)
        assert status is not None
        return status

    def starts(self) -> list[str]:
        return [sentence for sentence in self.said if sentence.startswith("starting the engine")]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("PYTHONPATH", import_path())
    config = EngineConfig(
        folder=tmp_path / "engine",
        python=sys.executable,
        device="cuda",
        port=0,
        start_seconds=START_SECONDS,
        command=simulated_command("--max-num-batched-tokens", "8192", "--gpu-memory-utilization", "0.92"),
        health_seconds=10.0,  # an engine that has no time on a busy machine must not count as dead
    )
    machine = Machine(config, monkeypatch)
    machine.has(CARD)
    yield machine
    stop_engine(config.folder)


async def test_memory_that_others_hold_lowers_the_share(machine: Machine) -> None:
    machine.start_needs("free_memory", gpu_memory_utilization=0.7)
    status = await machine.use()
    assert status.rung == "--gpu-memory-utilization 0.69"
    assert len(machine.starts()) == 2
    assert any("Free memory on device cuda:0 (11.39/15.57 GiB)" in sentence for sentence in machine.said)


async def test_a_climb_takes_as_many_steps_as_it_needs(machine: Machine) -> None:
    machine.start_needs("activations", max_num_batched_tokens=2048)
    status = await machine.use()
    assert status.rung == "--max-num-batched-tokens 2048"
    assert len(machine.starts()) == 3


async def test_a_share_that_is_too_small_is_raised(machine: Machine) -> None:
    machine.start_needs("no_kv_memory", raised_utilization=0.95)
    assert (await machine.use()).rung == "--gpu-memory-utilization 0.95"


async def test_three_tries_and_then_the_numbers_of_the_log(machine: Machine) -> None:
    machine.start_needs("kv_too_small")
    with pytest.raises(EngineStartFailed) as raised:
        await machine.use()
    assert len(machine.starts()) == 3
    words = str(raised.value)
    assert (raised.value.cause, raised.value.may_pass) == ("kv_too_small", False)
    for part in (
        "4.0 GiB KV cache is needed, which is larger than the available KV cache memory (2.41 GiB)",
        "Set --max-model-len of the model to 19728 or less",
        "Tried: as configured (kv_too_small); --gpu-memory-utilization 0.95 (kv_too_small); ",
    ):
        assert part in words
    assert engine_status(machine.config.folder) is None


@pytest.mark.parametrize("cause", ["weights", "model_gated", "unsupported", "argument"])
async def test_what_no_rung_mends_is_tried_once(machine: Machine, cause: str) -> None:
    machine.start_needs(cause)
    with pytest.raises(EngineStartFailed) as raised:
        await machine.use()
    assert (raised.value.cause, raised.value.may_pass, len(machine.starts())) == (cause, False, 1)


async def test_an_end_without_a_word_may_pass(machine: Machine) -> None:
    machine.start_needs("something that nobody has seen before")
    with pytest.raises(EngineStartFailed, match="something that nobody has seen before") as raised:
        await machine.use()
    assert (raised.value.cause, raised.value.may_pass, len(machine.starts())) == ("unknown", True, 1)


async def test_a_port_that_somebody_took_meanwhile_is_given_up(machine: Machine) -> None:
    """As when two engines start at once: both have found the port free."""
    machine.config = replace(machine.config, start_tries=2)
    machine.start_needs("port_taken")
    with pytest.raises(EngineStartFailed) as raised:
        await machine.use()
    assert (raised.value.cause, raised.value.may_pass, len(machine.starts())) == ("port_taken", True, 2)


async def test_the_rung_is_remembered(machine: Machine) -> None:
    machine.start_needs("sequences", max_num_seqs=128)
    await machine.use()
    machine.said.clear()
    async with machine.lease() as lease:
        assert lease.window == 256
        status = machine.status()
    assert (status.rung, status.max_num_seqs, len(machine.starts())) == ("--max-num-seqs 128", 128, 1)


@pytest.mark.parametrize("change", ["arguments", "driver"])
async def test_a_rung_of_other_arguments_or_another_driver_is_forgotten(machine: Machine, change: str) -> None:
    machine.start_needs("sequences", max_num_seqs=128)
    await machine.use()
    machine.start_needs_nothing()
    if change == "driver":
        machine.has(replace(CARD, identity="Some card, driver 2, 16384 MiB"))
    else:
        machine.config = replace(machine.config, max_num_seqs=200)
    assert (await machine.use()).rung == "as configured"


async def test_memory_that_is_free_again_is_taken(machine: Machine) -> None:
    machine.start_needs("free_memory", gpu_memory_utilization=0.7)
    await machine.use()
    machine.start_needs_nothing()
    assert (await machine.use()).rung == "--gpu-memory-utilization 0.69"
    machine.has(replace(CARD, free_share=0.95))
    assert (await machine.use()).rung == "as configured"
    assert msgspec.json.decode(EngineFolder(machine.config.folder).rungs.read_bytes()) == {}


async def test_a_probe_that_fails_goes_back_to_what_worked(machine: Machine) -> None:
    machine.start_needs("activations", max_num_batched_tokens=2048)
    await machine.use()
    machine.said.clear()
    machine.monkeypatch.setattr(rungs, "first_rung", lambda _known, top, _basis, **_: top)
    assert (await machine.use()).rung == "--max-num-batched-tokens 2048"
    assert len(machine.starts()) == 2, "not by way of 4096"


async def until_lost(lease: EngineLease) -> None:
    with pytest.raises(EngineUnavailable):
        await lease.send(a_request(1))


async def test_an_engine_that_runs_out_of_memory_comes_back_one_rung_lower(machine: Machine) -> None:
    async with machine.lease() as lease:
        assert (await lease.send(a_request())).status == 200
        before = machine.status()
        set_faults(int(before.url.rpartition(":")[2]), Faults(out_of_memory_after=0))
        await until_lost(lease)
        await lease.recover()
        assert (await lease.send(a_request(2))).status == 200
        after = machine.stop()
    assert after.rung == (
        "--max-num-seqs 128, --max-num-batched-tokens 4096, --gpu-memory-utilization 0.88, --max-model-len 2048"
    )
    assert after.max_model_len == before.max_model_len, "what it accepted it accepts"
    assert (await machine.use()).rung == after.rung, "and it is remembered"


async def test_an_engine_that_only_dies_comes_back_as_it_was(machine: Machine) -> None:
    async with machine.lease() as lease:
        set_faults(int(machine.status().url.rpartition(":")[2]), Faults(core_dies_after=0))
        await until_lost(lease)
        await lease.recover()
        assert machine.status().rung == "as configured"


@pytest.mark.parametrize("is_warmed", [True, False])
async def test_a_failure_that_nobody_waited_for_counts(machine: Machine, is_warmed: bool) -> None:
    """The engine was started ahead of its first chunk, or its starter was killed: its log still says why it ended."""
    machine.start_needs("sequences", max_num_seqs=128)
    manage_engine(machine.config).warm(TINY, machine.said.append)
    await asyncio.to_thread(wait_for, lambda: engine_status(machine.config.folder) is None, START_SECONDS)
    if is_warmed:
        manage_engine(machine.config).warm(TINY, machine.said.append)
    assert (await machine.use()).rung == "--max-num-seqs 128"
    assert len(machine.starts()) == 2


async def test_a_folder_that_cannot_remember_still_has_an_engine(machine: Machine) -> None:
    EngineFolder(machine.config.folder).create()
    EngineFolder(machine.config.folder).rungs.mkdir()
    machine.start_needs("sequences", max_num_seqs=128)
    assert (await machine.use()).rung == "--max-num-seqs 128"
