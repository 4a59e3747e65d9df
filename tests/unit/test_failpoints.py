"""Failpoints do nothing unless they are armed, act once, and leave a sign for the test."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vllm_batch_dagster.failpoints import POINTS, VARIABLE, InjectedFault, failpoint
from vllm_batch_dagster.settings import PROJECT_ROOT

PASS_TWICE = (
    "from vllm_batch_dagster.failpoints import failpoint\n"
    "for word in ('first', 'second', 'third'):\n"
    "    failpoint('merging', 'batch_1')\n"
    "    print(word, flush=True)\n"
)


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def test_without_the_variable_an_order_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merging").write_text("raise")
    failpoint("merging", "batch_1")
    assert (tmp_path / "merging").exists()


def test_an_order_for_another_point_or_batch_is_left_alone(armed: Path) -> None:
    (armed / "merging.batch_2").write_text("raise")
    (armed / "merged.batch_1").write_text("raise")
    failpoint("merging", "batch_1")
    assert sorted(path.name for path in armed.iterdir()) == ["merged.batch_1", "merging.batch_2"]


def test_the_third_pass_raises_and_no_other(armed: Path) -> None:
    (armed / "merging.batch_1").write_text("raise 3")
    failpoint("merging", "batch_1")
    failpoint("merging", "batch_1")
    with pytest.raises(InjectedFault):
        failpoint("merging", "batch_1")
    failpoint("merging", "batch_1")
    assert [path.name for path in armed.iterdir()] == ["merging.batch_1.hit"]


def test_a_full_disk(armed: Path) -> None:
    (armed / "merging").write_text("full")
    with pytest.raises(OSError, match="No space left"):
        failpoint("merging", "batch_1")


def test_a_kill_ends_the_process_at_the_second_pass(armed: Path) -> None:
    (armed / "merging.batch_1").write_text("kill 2")
    ended = subprocess.run(
        [sys.executable, "-c", PASS_TWICE], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "first\n")
    assert (armed / "merging.batch_1.hit").read_text().isdigit()


def test_a_hold_lasts_until_the_test_lets_go(armed: Path) -> None:
    (armed / "merging.batch_1").write_text("hold")
    hit, passed = armed / "merging.batch_1.hit", threading.Event()
    thread = threading.Thread(target=lambda: (failpoint("merging", "batch_1"), passed.set()))
    thread.start()
    while not hit.exists():
        assert not passed.wait(0.01)
    assert not passed.wait(0.1)
    hit.unlink()
    thread.join()
    assert passed.is_set()


def test_a_hold_that_nobody_ends_ends(armed: Path) -> None:
    (armed / "merging.batch_1").write_text("hold 1 0.05")
    failpoint("merging", "batch_1")
    assert (armed / "merging.batch_1.hit").exists()


def test_every_point_of_the_list_is_passed_somewhere_and_no_other() -> None:
    """The list is what the matrix runs through: a point that nobody passes would make its cases wait for ever."""
    sources = [path.read_text() for path in (PROJECT_ROOT / "vllm_batch_dagster").rglob("*.py")]
    passed = {text.split('"')[1] for source in sources for text in source.split("failpoint(")[1:] if text[0] == '"'}
    assert passed == set(POINTS)
