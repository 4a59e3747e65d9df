"""The process dies exactly at each failpoint of a run, and another one goes on: the real store, files and history, but
each step in a process that the test may lose. What a daemon does, marking a dead run as failed, the test does.
"""

import multiprocessing
import signal
from pathlib import Path

import pytest

from tests.faults.kill_steps import do_step
from tests.faults.matrix import RUN_POINTS

LATER_PASS = {"chunk_start": 2, "mid_chunk": 2, "last_line": 2, "sealed": 2, "published": 3, "merging": 5}
SECONDS = 120

pytestmark = pytest.mark.timeout(2 * SECONDS + 60)

# Forked from a server that has no threads and has imported everything: this process has threads, and a fork of it may
# find one of their locks held for ever.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.faults.kill_steps"])


@pytest.mark.parametrize("point", RUN_POINTS)
def test_another_process_goes_on_where_one_died(point: str, tmp_path: Path) -> None:
    points = tmp_path / "failpoints"
    points.mkdir()
    (points / point).write_text(f"kill {LATER_PASS.get(point, 1)}")

    assert in_child(tmp_path, "drive") == -signal.SIGKILL, words_of(tmp_path)
    assert (points / f"{point}.hit").exists()
    assert in_child(tmp_path, "go_on") == 0, words_of(tmp_path)


def words_of(folder: Path) -> str:
    path = folder / "words"
    return path.read_text() if path.exists() else "it said nothing"


def in_child(folder: Path, name: str) -> int | None:
    """Do a step in a process of its own and return its exit code, None when it did not end."""
    child = _processes.Process(target=do_step, args=(folder, name, folder / "failpoints", folder / "words"))
    child.start()
    child.join(SECONDS)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    return code
