"""Runs whose disk is full or whose store is locked: they pause, lose no answer, and go on when there is room again."""

import asyncio
import gc
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.conftest import FAST, Rig, WatchedEngine, answer_of, id_range, ids, until
from vllm_batch_dagster.adapters.store import open_store
from vllm_batch_dagster.core.pauses import ALL, Pause, PauseCause
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.stages.pausing import PausePolicy
from vllm_batch_dagster.stages.watching import DiskWatch

KIB = 1 << 10
DISK_KIB = 4096
LINES = 40
AT_ONCE = replace(FAST, pauses=PausePolicy(patience=0.0))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("a small file system can only be mounted by root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"root may not mount a tmpfs here (a container without CAP_SYS_ADMIN?): {mounted.stderr.strip()}")
    yield folder
    gc.collect()
    # Lazily: a thread of the test that is late may still hold a file there.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def fill(folder: Path, leave: int) -> Path:
    """Take all of the disk but `leave` bytes."""
    filler = folder / "filler"
    filler.write_bytes(bytes(free(folder) - leave))
    return filler


def talk(_request: EngineRequest) -> EngineAnswer:
    """Answer with 4 KiB: all the answers take more than what a test leaves free."""
    return answer_of(b'{"choices":[{"finish_reason":"stop","text":"%s"}]}' % (b"x" * 4 * KIB))


@pytest.fixture(params=["journals", "journals and store"])
def full(request: pytest.FixtureRequest, small_disk: Path) -> Iterator[Rig]:
    """An installation whose journals, or everything, lie on the small disk."""
    rig = Rig(small_disk)
    if request.param == "journals and store":
        store = open_store(f"sqlite:///{small_disk / 'batches.db'}")
        rig.store = store  # type: ignore[assignment]
        yield rig
        store.close()
    else:
        yield rig


async def test_a_disk_that_fills_up_pauses_the_batch_and_corrupts_nothing(full: Rig) -> None:
    batch_id = full.start(LINES, chunk_size=LINES)
    filler = fill(full.folder, leave=48 * KIB)
    first = WatchedEngine(talk, window=2)
    pause = await full.infer(batch_id, first, policy=AT_ONCE)
    assert isinstance(pause, Pause)
    assert (pause.scope, pause.cause) == (ALL, PauseCause.STORAGE)
    assert full.batch(batch_id).status is BatchStatus.IN_PROGRESS
    kept = {record.line for record in full.journal(batch_id, 0, 1)}
    assert len(kept) < LINES
    assert full.store.chunks.get(batch_id, 0).engine_failures == 0

    filler.unlink()
    full.clock.advance(30)
    second = WatchedEngine(talk)
    assert await full.infer(batch_id, second, policy=AT_ONCE) is None
    assert sorted(second.asked) == sorted(set(range(LINES)) - kept), "what is in the journal is not sent again"
    assert list(full.store.pauses.list()) == []
    full.merge(batch_id)
    assert full.batch(batch_id).status is BatchStatus.COMPLETED
    assert ids(full.output(batch_id)) == id_range(LINES)


async def test_the_reserve_pauses_before_the_disk_is_full(full: Rig) -> None:
    batch_id = full.start(LINES, chunk_size=LINES)
    looks: list[int] = []

    def look() -> int:
        looks.append(free(full.folder))
        return looks[-1]

    watch = DiskWatch(look, 256 * KIB, str(full.folder))
    engine = WatchedEngine(holds=lambda line: line >= 4, window=2)
    run = asyncio.create_task(full.infer(batch_id, engine, policy=AT_ONCE, watches=[watch]))
    await until(lambda: engine.in_flight == {4, 5})
    filler = fill(full.folder, leave=200 * KIB)
    seen = len(looks)
    await until(lambda: len(looks) >= seen + 3)  # of these the second began after the filler, and has had its effect
    engine.release()
    pause = await run
    assert isinstance(pause, Pause)
    assert (pause.cause, pause.until) == (PauseCause.STORAGE, None)
    assert "DISK_RESERVE_BYTES" in pause.reason
    assert {record.line for record in full.journal(batch_id, 0, 1)} == set(range(6))
    filler.unlink()
    assert await full.infer(batch_id, WatchedEngine(), policy=AT_ONCE, watches=[watch]) is None
    full.merge(batch_id)
    assert ids(full.output(batch_id)) == id_range(LINES)


async def test_a_locked_store_pauses_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_batch_dagster.adapters.store.database.BUSY_SECONDS", 0.2)
    rig = Rig(tmp_path)
    store = open_store(f"sqlite:///{tmp_path / 'batches.db'}")
    rig.store = store  # type: ignore[assignment]
    batch_id = rig.start(6)
    engine = WatchedEngine(holds=lambda line: line == 4, window=1)
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=AT_ONCE, only=[0]))
    await until(lambda: engine.in_flight == {4})
    blocker = sqlite3.connect(tmp_path / "batches.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    engine.release()
    pause = await run
    assert isinstance(pause, Pause)
    assert pause.cause is PauseCause.STORAGE
    assert "locked" in pause.reason
    blocker.execute("ROLLBACK")
    blocker.close()
    assert len(rig.journal(batch_id, 0, 1)) == 5
    second = WatchedEngine()
    assert await rig.infer(batch_id, second, policy=AT_ONCE) is None
    assert second.asked == [5], "the answers of the first chunk were durable already"
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) == id_range(6)
    store.close()
