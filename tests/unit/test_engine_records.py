"""Whose process is it? Process ids come again, boots end, leaders die before the rest of their group."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from vllm_batch_dagster.adapters.engine.folder import EngineFolder, EngineRecord
from vllm_batch_dagster.adapters.engine.processes import (
    FOLDER_VARIABLE,
    boot_id,
    kill_group,
    members_of,
    spawn,
    start_of,
)
from vllm_batch_dagster.cli.processes import is_alive

pytestmark = pytest.mark.timeout(180)

# An engine in two processes: its core outlives it.
ENGINE = (
    "import subprocess, sys, time; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); print('up', flush=True); time.sleep(600)"
)


@pytest.fixture
def folder(tmp_path: Path) -> EngineFolder:
    folder = EngineFolder(tmp_path / "engine")
    folder.create()
    return folder


@pytest.fixture
def record(folder: EngineFolder) -> Iterator[EngineRecord]:
    """The record of a living engine, written down."""
    pid = spawn([sys.executable, "-c", ENGINE], folder.root, {}, folder.log)
    end = time.monotonic() + 120
    while "up" not in folder.log.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    record = EngineRecord(
        serial="one",
        fingerprint="",
        model="tiny",
        command=(),
        port=1,
        max_num_seqs=1,
        boot=boot_id(),
        started_at=0.0,
        log_offset=0,
        pid=pid,
        process_start=start_of(pid) or "",
        members=tuple(members_of(pid)),
    )
    folder.write(record)
    yield record
    kill_group(pid)


@pytest.fixture
def bystander() -> Iterator[int]:
    """A process of somebody else that leads a group, as a shell's job does."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    yield process.pid
    process.kill()
    process.wait()


def test_a_living_engine_is_known_and_ended_whole(folder: EngineFolder, record: EngineRecord) -> None:
    assert record.is_alive
    assert len(record.members) == 2
    (folder.sockets / "b17b6433").touch()
    assert folder.end_engine(0.0) == "tiny"
    assert members_of(record.pid) == []
    assert folder.read() is None
    assert list(folder.sockets.iterdir()) == []


@pytest.mark.parametrize("has_record", [True, False])
def test_an_orphaned_core_is_found(folder: EngineFolder, record: EngineRecord, has_record: bool) -> None:
    """The API server was killed: with its record the members tell, without one the mark in their environment."""
    os.kill(record.pid, 9)
    while start_of(record.pid):
        time.sleep(0.02)
    assert not record.is_alive
    assert record.groups() == {record.pid}
    if not has_record:
        folder.forget()
    assert folder.living_groups() == {record.pid}
    folder.end_engine(0.0)
    assert members_of(record.pid) == []


def test_a_process_id_of_another_boot_means_nothing(record: EngineRecord) -> None:
    old = replace(record, boot="another boot")
    assert not old.is_alive
    assert old.groups() == set()


def test_a_process_that_got_the_number_of_an_old_engine_is_left_alone(
    folder: EngineFolder, record: EngineRecord, bystander: int
) -> None:
    stale = replace(record, pid=bystander, members=((bystander, "1"),))
    folder.write(stale)
    assert not stale.is_alive
    assert stale.groups() == set()
    folder.end_engine(0.0)
    assert is_alive(psutil.Process(bystander))
    assert members_of(record.pid) == [], "the mark leads to the true one"


def test_an_engine_of_another_folder_is_left_alone(tmp_path: Path, record: EngineRecord) -> None:
    other = EngineFolder(tmp_path / "engine-of-another-stack")
    other.create()
    assert psutil.Process(record.pid).environ()[FOLDER_VARIABLE] != str(other.root)
    assert other.living_groups() == set()


def test_a_record_of_an_older_version_can_be_read(folder: EngineFolder, record: EngineRecord) -> None:
    old = {name: value for name, value in vars_of(record).items() if name not in ("rung", "rung_words", "served_from")}
    folder.replace_file(folder.root / "engine.json", msgspec.json.encode(old))
    assert folder.read() == record


def vars_of(record: EngineRecord) -> dict[str, object]:
    found: dict[str, object] = msgspec.to_builtins(record)
    return found
