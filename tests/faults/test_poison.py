"""Lines that kill or wedge an engine of real processes: they are found, everything else is answered exactly once."""

import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.batches import chat, finish, ids, read, submit
from tests.faults.engine_group import write_engine_python
from tests.stack import START_SECONDS, Stack, wait_for
from tests.unit.conftest import FAST, Rig, id_range, request_line
from tests.unit.conftest import ids as names
from vllm_batch_dagster.adapters.engine import connect_engines, manage_engine, stop_engine
from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.adapters.engine.server import Pace
from vllm_batch_dagster.adapters.simulated import Faults, SimulatedProcess, import_path, simulated_command
from vllm_batch_dagster.adapters.simulated.faults import VARIABLE
from vllm_batch_dagster.core.ports import EngineManager
from vllm_batch_dagster.core.states import BatchStatus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

POLICY = replace(FAST, chunk_attempts=1, poll_seconds=0.5)
MANDRAKE = {"model": "tiny", "messages": [{"role": "user", "content": "mandrake"}]}


@pytest.fixture(autouse=True)
def _probe_patiently(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that has no time on a busy machine must not count as dead: those that die here refuse connections."""
    monkeypatch.setattr(Pace, "probe_seconds", 30.0)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "rig")


def with_poison(total: int, *poison: int) -> bytes:
    kinds = ({"body": MANDRAKE} if number in poison else {} for number in range(total))
    return b"".join(request_line(f"id-{number}", **changes) for number, changes in enumerate(kinds))


@contextmanager
def managed(folder: Path, witness: Path, seqs: int, **pace: float) -> Iterator[EngineManager]:
    command = simulated_command("--witness", str(witness), "--latency", "0.005")
    config = EngineConfig(
        folder=folder, python=sys.executable, device="cpu", port=0, max_num_seqs=seqs, command=command, **pace
    )
    try:
        yield manage_engine(config)
    finally:
        stop_engine(folder)


def sends(witness: Path) -> Counter[int]:
    return Counter(int(name.rpartition("-")[2]) for name in witness.read_text().split())


def assert_isolated(rig: Rig, batch_id: str, total: int, poison: set[int]) -> None:
    rig.merge(batch_id)
    assert rig.batch(batch_id).status is BatchStatus.COMPLETED
    assert names(rig.errors(batch_id)) == [f"id-{line}" for line in sorted(poison)]
    assert names(rig.output(batch_id)) == [name for name in id_range(total) if int(name[3:]) not in poison]
    assert {row["error"]["code"] for row in rig.errors(batch_id)} == {"engine_crashed"}
    records = (record for chunk in rig.store.chunks.list(batch_id) for record in rig.journal(batch_id, chunk.index, 1))
    assert Counter(record.line for record in records) == dict.fromkeys(range(total), 1)


async def test_one_line_of_two_thousand(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 256: how many deaths, and how many lines are sent again."""
    monkeypatch.setenv("PYTHONPATH", import_path())
    monkeypatch.setenv(VARIABLE, json.dumps({"poison": "mandrake"}))
    witness, total, poison = tmp_path / "witness", 2000, 1234
    batch_id = rig.start(with_poison(total, poison), chunk_size=500)
    said: list[str] = []
    with managed(tmp_path / "engine", witness, 128, start_seconds=START_SECONDS) as engines:
        await rig.infer(batch_id, engines, policy=POLICY, said=said)
    asked = sends(witness)
    deaths = sum(sentence.startswith("starting the engine") for sentence in said) - 1
    again = sum(asked.values()) - total
    assert_isolated(rig, batch_id, total, {poison})
    assert "its process had ended" in rig.errors(batch_id)[0]["error"]["message"]
    assert deaths <= 13  # log2(256) + 5
    assert again <= 3 * 256 + asked[poison]


async def test_a_line_that_wedges_the_engine(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", import_path())
    monkeypatch.setenv(VARIABLE, json.dumps({"hang_on": "mandrake"}))
    witness, total = tmp_path / "witness", 40
    batch_id = rig.start(with_poison(total, 13), chunk_size=20)
    pace = {"health_seconds": 0.2, "stall_seconds": 1.0, "start_seconds": START_SECONDS}
    with managed(tmp_path / "engine", witness, 4, **pace) as engines:
        await rig.infer(batch_id, engines, policy=POLICY)
    assert_isolated(rig, batch_id, total, {13})
    assert "hangs" in rig.errors(batch_id)[0]["error"]["message"]


@contextmanager
def kept_alive(*servers: SimulatedProcess) -> Iterator[None]:
    """Somebody else starts the servers again when they end."""
    over = threading.Event()

    def keep(server: SimulatedProcess) -> None:
        while not over.is_set():
            if server.is_over():
                with suppress(TimeoutError):  # it may meet the poison again before it has been seen to be ready
                    server.start()
            over.wait(0.05)

    keepers = [threading.Thread(target=keep, args=(server,)) for server in servers]
    for keeper in keepers:
        keeper.start()
    try:
        yield
    finally:
        over.set()
        for keeper in keepers:
            keeper.join()


async def test_two_servers_of_somebody_else(rig: Rig, tmp_path: Path) -> None:
    total, poison, faults = 300, {40, 222}, Faults(poison="mandrake")
    batch_id = rig.start(with_poison(total, *poison), chunk_size=100)
    options: Any = ("--model", "tiny", "--max-num-seqs", "8", "--latency", "0.01")
    with (
        SimulatedProcess(*options, faults=faults, witness=tmp_path / "one") as one,
        SimulatedProcess(*options, faults=faults, witness=tmp_path / "two") as two,
        kept_alive(one, two),
    ):
        engines = connect_engines(f"{one.url},{two.url}", "", 8, start_seconds=START_SECONDS, health_seconds=0.2)
        await rig.infer(batch_id, engines, policy=POLICY)
    assert_isolated(rig, batch_id, total, poison)


def test_through_the_whole_stack(tmp_path: Path) -> None:
    witness, total, poison = tmp_path / "witness", 120, 77
    settings = {"ENGINE_URL": "", "CHUNK_SIZE": "40", "CHUNK_SLOTS": "4", "MAX_NUM_SEQS": "16"}
    python = write_engine_python(tmp_path, witness, 0.02)
    faults = json.dumps({"poison": "mandrake"})
    stack = Stack(tmp_path, ENGINE_PYTHON=str(python), ENGINE_PORT="0", **settings, **{VARIABLE: faults})
    lines = [chat(number, "tiny", **({"user": "mandrake"} if number == poison else {})) for number in range(total)]
    up = stack.start()
    try:
        wait_for(lambda: "ready in" in stack.said() or up.poll() is not None, START_SECONDS)
        assert up.poll() is None, stack.said()
        client = openai.OpenAI(base_url=stack.api_url, api_key="any")
        batch = finish(client, submit(client, lines).id)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (total - 1, 1)
        assert ids(read(client, batch.output_file_id)) == [f"line-{n}" for n in range(total) if n != poison]
        (error,) = read(client, batch.error_file_id)
    finally:
        stack.run("down")
        up.wait()
    assert (error["custom_id"], error["response"], error["error"]["code"]) == ("line-77", None, "engine_crashed")
    asked = sends(witness)
    assert sum(asked.values()) - total <= 5 * 32
