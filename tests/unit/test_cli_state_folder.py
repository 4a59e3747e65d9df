"""One `up` per state folder, known to everybody, and forgotten when it ends in whatever way."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_batch_dagster.cli.state_folder import (
    ServiceRecord,
    StackRecord,
    hold_stack,
    holder_pid,
    make_state_folder,
    read_record,
    write_record,
)
from vllm_batch_dagster.core.errors import ConfigurationError, StateConflict

HOLD = """
import sys, time
from pathlib import Path
from vllm_batch_dagster.cli.state_folder import hold_stack
with hold_stack(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_holder_is_refused_with_the_first_ones_pid(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    assert holder_pid(tmp_path) == other.pid
    with pytest.raises(StateConflict, match=rf"pid {other.pid}\).*vllm-batch down"), hold_stack(tmp_path):
        pass
    assert holder_pid(tmp_path) == other.pid


def test_the_folder_is_free_after_the_holder_ended(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.communicate()
    assert holder_pid(tmp_path) is None
    assert not list(tmp_path.iterdir())
    with hold_stack(tmp_path):
        assert holder_pid(tmp_path) is not None


def test_the_folder_is_free_after_the_holder_was_killed(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert holder_pid(tmp_path) is None
    with hold_stack(tmp_path):
        pass


def test_a_record_counts_only_while_its_writer_holds_the_folder(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    record = StackRecord(other.pid, 1.5, True, [ServiceRecord("api", 12, 2.5)])
    assert read_record(tmp_path) is None
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    other.kill()
    other.wait()
    assert read_record(tmp_path) is None


def test_a_record_of_another_version_is_no_record(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    (tmp_path / "up.json").write_text(f'{{"pid": {other.pid}}}')
    assert read_record(tmp_path) is None


def test_nobody_holds_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    assert holder_pid(tmp_path / "nowhere") is None
    assert read_record(tmp_path / "nowhere") is None


def test_the_state_folder_is_made_for_its_owner_only(tmp_path: Path) -> None:
    home = tmp_path / "a" / "b"
    make_state_folder(home)
    assert home.stat().st_mode & 0o777 == 0o700
    assert not list(home.iterdir())


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot be written to.*VLLM_BATCH_HOME"):
        make_state_folder(tmp_path / "file" / "home")
