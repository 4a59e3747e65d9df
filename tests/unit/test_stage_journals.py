"""Journals on a disk that fails, fills up or was cut: only what is on disk counts, and nothing on disk is lost."""

import asyncio
import errno
import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.unit.conftest import FAST, Rig, WatchedEngine, id_range, ids, line_of, until
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.core.errors import (
    CorruptJournal,
    EngineFailure,
    EngineUnavailable,
    StorageFailure,
)
from vllm_batch_dagster.core.pauses import Pause, PauseCause
from vllm_batch_dagster.core.ports import EngineRequest
from vllm_batch_dagster.stages.journals import JournalWriter
from vllm_batch_dagster.stages.pausing import lift


class Disk:
    """What journals are written to: `room` bytes are left (None: enough), and a write waits for `gate`."""

    def __init__(self) -> None:
        self.room: int | None = None
        self.gate, self.writing = threading.Event(), threading.Event()
        self.gate.set()
        self._write = os.write

    def write(self, descriptor: int, data: memoryview) -> int:
        self.writing.set()
        self.gate.wait(50)
        if self.room is None:
            return self._write(descriptor, data)
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: self.room]
        self.room -= len(part)
        return self._write(descriptor, part)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(os, "write", disk.write)
    return disk


def journalled(rig: Rig, batch_id: str, epoch: int = 1) -> list[int]:
    chunks = rig.store.chunks.list(batch_id)
    return sorted(record.line for chunk in chunks for record in rig.journal(batch_id, chunk.index, epoch))


def open_journals(folder: Path) -> list[str]:
    paths = [file.path for file in psutil.Process().open_files()]
    return [path for path in paths if path.startswith(str(folder)) and path.endswith(".jsonl")]


def refused(rig: Rig, ending: object, words: str) -> None:
    """The run was paused because the disk refused a write; an operator then tries again at once."""
    assert isinstance(ending, Pause)
    assert ending.cause is PauseCause.STORAGE
    assert words in ending.reason
    assert list(lift(rig.store.pauses, None)) == [ending]


async def finish(rig: Rig, batch_id: str) -> list[int]:
    """Run what is left on a good engine, merge, and return the lines that were sent for it."""
    engine = WatchedEngine()
    await rig.infer(batch_id, engine)
    rig.merge(batch_id)
    total = rig.batch(batch_id).counts.total
    assert ids(rig.output(batch_id)) == id_range(total)
    return sorted(engine.asked)


@pytest.mark.parametrize("room", [0, 1, 100, 700])
async def test_a_full_disk_surfaces_and_nothing_counts_that_is_not_on_it(rig: Rig, disk: Disk, room: int) -> None:
    batch_id = rig.start(20, chunk_size=10)
    disk.room = room
    engine = EchoEngine(window=4, latency=0.001)
    refused(rig, await rig.infer(batch_id, engine, policy=replace(FAST, commit_records=2)), "No space left")
    disk.room = None
    kept = journalled(rig, batch_id)
    assert len(kept) < 20
    assert rig.batch(batch_id).counts.completed <= len(kept)
    assert not any(chunk.is_published for chunk in rig.store.chunks.list(batch_id))
    assert open_journals(rig.folder) == []
    assert await finish(rig, batch_id) == sorted(set(range(20)) - set(kept))


async def test_nothing_is_written_behind_a_torn_record(rig: Rig, disk: Disk) -> None:
    path = rig.workspace.journal_path("batch_1", 0, 1)
    writer = JournalWriter(path)
    writer.write([b"whole\n"])
    disk.room = 3
    with pytest.raises(StorageFailure):
        writer.write([b"second\n"])
    disk.room = None  # somebody has made room
    with pytest.raises(StorageFailure):
        writer.write([b"third\n"])
    writer.close()
    assert path.read_bytes() == b"whole\nsec"


async def test_a_short_write_goes_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    batch_id = rig.start(5)
    assert await finish(rig, batch_id) == [0, 1, 2, 3, 4]
    assert journalled(rig, batch_id) == [0, 1, 2, 3, 4]


async def test_a_failed_fsync_is_a_storage_failure(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    batch_id = rig.start(5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", refuse)
        refused(rig, await rig.infer(batch_id, EchoEngine()), "Input/output error")
    assert rig.batch(batch_id).counts.completed == 0
    assert not rig.store.chunks.get(batch_id, 0).is_published
    await finish(rig, batch_id)


def test_a_journal_is_never_opened_twice(rig: Rig) -> None:
    path = rig.workspace.journal_path("batch_1", 0, 1)
    JournalWriter(path).close()
    with pytest.raises(StorageFailure, match="File exists"):
        JournalWriter(path)


def test_a_journal_that_cannot_be_created_is_a_storage_failure(rig: Rig) -> None:
    with pytest.raises(StorageFailure, match="No such file"):
        JournalWriter(rig.folder / "none" / "1.jsonl")


@pytest.mark.parametrize("cut", [1, 20, 60])
async def test_a_torn_tail_is_sent_again(rig: Rig, cut: int) -> None:
    batch_id = rig.start(6, chunk_size=6)

    def no_restart() -> None:
        raise EngineFailure("gone")

    def dies_at_the_fifth(request: EngineRequest) -> EngineUnavailable | None:
        return EngineUnavailable("reset") if line_of(request) == 4 else None

    with pytest.raises(EngineFailure):
        await rig.infer(batch_id, EchoEngine(dies_at_the_fifth, window=1, on_recover=no_restart))
    path = rig.workspace.journal_path(batch_id, 0, 1)
    assert journalled(rig, batch_id) == [0, 1, 2, 3]
    path.write_bytes(path.read_bytes()[:-cut])
    assert await finish(rig, batch_id) == [3, 4, 5]


async def test_a_damaged_answer_never_reaches_the_output(rig: Rig) -> None:
    batch_id = rig.start(5)
    await rig.infer(batch_id, EchoEngine())
    path = rig.workspace.journal_path(batch_id, 0, 1)
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptJournal, match="run the chunk again"):
        rig.merge(batch_id)


async def test_a_commit_under_way_is_waited_for_when_the_run_ends(rig: Rig, disk: Disk) -> None:
    batch_id = rig.start(5)

    def no_restart() -> None:
        raise EngineFailure("gone")

    def die_behind_the_first(request: EngineRequest) -> EngineUnavailable | None:
        return EngineUnavailable("reset") if line_of(request) else None

    disk.gate.clear()
    engine = WatchedEngine(die_behind_the_first, holds=lambda line: line > 0, window=1, on_recover=no_restart)
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=replace(FAST, commit_records=1)))
    await until(disk.writing.is_set)
    engine.release()
    opener = threading.Timer(0.2, disk.gate.set)
    opener.start()
    with pytest.raises(EngineFailure):
        await run
    opener.join()
    assert journalled(rig, batch_id) == [0]
    assert await finish(rig, batch_id) == [1, 2, 3, 4]


async def test_all_journals_are_closed_even_when_one_cannot_be_written(rig: Rig, disk: Disk) -> None:
    batch_id = rig.start(4, chunk_size=1)
    engine = WatchedEngine(holds=lambda line: line == 3, window=4)
    slow = replace(FAST, commit_seconds=3600, commit_records=100, poll_seconds=3600)
    disk.room = 0
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=slow))
    refused(rig, await run, "No space left")
    assert open_journals(rig.folder) == []


async def test_no_line_is_journalled_twice_by_one_attempt(rig: Rig) -> None:
    batch_id = rig.start(40, chunk_size=10)
    await rig.infer(batch_id, EchoEngine(window=7), policy=replace(FAST, commit_records=3))
    assert Counter(journalled(rig, batch_id)) == dict.fromkeys(range(40), 1)
