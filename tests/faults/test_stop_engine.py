"""Cancel and expiry on a real vLLM: what is in flight is aborted in the engine, as its own gauges say, at once.

How long that took, from the cancel to the end of the run and until the engine was idle, is logged
(`--log-cli-level=INFO`).
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.unit.conftest import DAY, FAST, Rig, id_range, ids, request_line
from vllm_batch_dagster.adapters.engine import engine_status, manage_engine, stop_engine
from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.composition import build_catalog
from vllm_batch_dagster.core.models import Model, StopReason
from vllm_batch_dagster.core.ports import EngineManager
from vllm_batch_dagster.core.states import BatchEvent
from vllm_batch_dagster.settings import load_settings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

SEQUENCES, LINES, TOKENS = 4, 40, 1500
MODEL = "smollm2-135m-instruct"
AS_SHIPPED = replace(FAST, poll_seconds=1.0)  # how often a run looks whether its batch goes on


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineManager, Path]]:
    settings = load_settings()
    if not Path(settings.engine_python).exists():
        pytest.fail(f"the engine environment is missing ({settings.engine_python}): run `make setup`")
    folder = tmp_path_factory.mktemp("stopped") / "engine"
    config = EngineConfig(folder, settings.engine_python, device="cpu", port=0, max_num_seqs=SEQUENCES)
    yield manage_engine(config), folder
    stop_engine(folder)


def demo_model() -> Model:
    found = build_catalog(load_settings()).find(MODEL)
    assert found is not None, f"the model {MODEL} is missing: run `make setup`"
    return replace(found, name="tiny")


def long_lines() -> bytes:
    """Answers that take minutes: none in flight ends by itself while a test looks."""
    messages = [{"role": "user", "content": "Tell me a long story."}]
    long = {"model": "tiny", "messages": messages, "max_tokens": TOKENS, "ignore_eos": True}
    short = long | {"max_tokens": 2}
    return b"".join(request_line(f"id-{n}", body=short if n < 2 else long) for n in range(LINES))


def gauge(folder: Path, name: str) -> float:
    """Add up a metric of the engine over its labels."""
    status = engine_status(folder)
    if status is None:
        return 0.0
    with urlopen(f"{status.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name} (\S+)$", text, re.MULTILINE))


def in_engine(folder: Path) -> int:
    return int(gauge(folder, r"vllm:num_requests_(?:running|waiting)\{[^}]*\}"))


def finished(folder: Path) -> int:
    """Requests that the engine has brought to an end; it does not count those that it aborts."""
    return int(gauge(folder, r"vllm:request_success_total\{[^}]*\}"))


async def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for something that is asked over HTTP."""
    async with asyncio.timeout(600):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - another process is asked
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("reason", StopReason)
async def test_what_is_in_flight_is_aborted_in_the_engine(
    tmp_path: Path, engine: tuple[EngineManager, Path], reason: StopReason
) -> None:
    manager, folder = engine
    rig = Rig(tmp_path)
    batch_id = rig.start(long_lines(), chunk_size=LINES)
    run = asyncio.create_task(rig.infer(batch_id, manager, policy=AS_SHIPPED, model=demo_model()))
    window = 2 * SEQUENCES
    await wait_for(lambda: run.done() or (rig.batch(batch_id).counts.completed == 2 and in_engine(folder) == window))
    before = finished(folder)
    began = time.monotonic()
    if reason is StopReason.CANCELLED:
        rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    else:
        rig.clock.advance(DAY)
    assert await run is reason
    ended = time.monotonic() - began
    await wait_for(lambda: in_engine(folder) == 0)
    idle = time.monotonic() - began
    logging.getLogger(__name__).info("%s: run ended after %.2f s, engine idle after %.2f s", reason.value, ended, idle)
    assert finished(folder) == before, "none was waited for"
    rig.merge(batch_id)
    assert rig.batch(batch_id).status.value == reason.value.removeprefix("batch_")
    assert ids(rig.output(batch_id)) == id_range(2)
    assert ids(rig.errors(batch_id)) == id_range(2, LINES)
