"""The common log: prefixes, files, rotation, chatter, and following the engine's file."""

import io
import os
import threading
from pathlib import Path

import pytest

from vllm_batch_dagster.cli import group_log
from vllm_batch_dagster.cli.group_log import FileFollower, GroupLog, pump


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(terminal: io.StringIO) -> list[str]:
    return terminal.getvalue().splitlines()


def test_lines_have_a_prefix_of_one_width_and_go_to_a_file_each(tmp_path: Path) -> None:
    terminal = io.StringIO()
    log = GroupLog(tmp_path, terminal, {})
    log.add("api", "one")
    log.add("daemon", "two")
    log.close()
    assert lines_of(terminal) == ["api    | one", "daemon | two"]
    assert (tmp_path / "api.log").read_text() == "one\n"
    assert (tmp_path / "daemon.log").read_text() == "two\n"


def test_colours_are_for_terminals_only(tmp_path: Path) -> None:
    coloured = "\x1b[32mgreen\x1b[0m"
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        log = GroupLog(tmp_path, stream, {"api": "green"})
        log.add("api", coloured)
        log.close()
    assert coloured in terminal.getvalue()
    assert terminal.getvalue().startswith("\x1b[")
    assert lines_of(pipe) == ["api    | green"]
    assert (tmp_path / "api.log").read_text() == "green\ngreen\n"


def test_percent_signs_are_text(tmp_path: Path) -> None:
    log = GroupLog(tmp_path, None, {})
    log.add("api", "100 %s done %d")
    log.close()
    assert (tmp_path / "api.log").read_text() == "100 %s done %d\n"


@pytest.mark.parametrize(
    "line",
    [
        "2026-01-01 00:00:00 +0000 - dagster.daemon.SensorDaemon - INFO - Checking for new runs for sensor: admit",
        "2026-01-01 00:00:00 +0000 - dagster.daemon.SensorDaemon - INFO - Sensor reconcile_batches skipped: none",
        "dagster.daemon.MonitoringDaemon - INFO - Checking run 2cf1251e-5a73-424b-85ae-8934312b295c",
    ],
)
def test_chatter_is_kept_in_the_file_only(tmp_path: Path, line: str) -> None:
    terminal = io.StringIO()
    log = GroupLog(tmp_path, terminal, {})
    log.add("daemon", line)
    log.close()
    assert terminal.getvalue() == ""
    assert (tmp_path / "daemon.log").read_text() == f"{line}\n"


def test_files_rotate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_log, "FILE_BYTES", 100)
    monkeypatch.setattr(group_log, "OLD_FILES", 2)
    log = GroupLog(tmp_path, None, {})
    for number in range(100):
        log.add("api", f"line {number}")
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["api.log", "api.log.1", "api.log.2"]
    assert all(path.stat().st_size <= 100 for path in tmp_path.iterdir())
    assert (tmp_path / "api.log").read_text().endswith("line 99\n")


def test_the_last_words_are_at_hand(tmp_path: Path) -> None:
    log = GroupLog(tmp_path, None, {})
    for number in range(100):
        log.add("api", f"\x1b[31m{number}\x1b[0m")
    log.close()
    assert log.recent("api") == [str(number) for number in range(100 - group_log.RECENT_LINES, 100)]
    assert log.recent("nobody") == []


def test_a_closed_terminal_does_not_stop_the_files(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as terminal:
        log = GroupLog(tmp_path, terminal, {})
        log.add("api", "one")
        log.add("api", "two")
        log.close()
        # What is buffered cannot be written any more; closing must not fail for it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), terminal.fileno())
    assert (tmp_path / "api.log").read_text() == "one\ntwo\n"


def test_a_pipe_is_pumped_to_its_end(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    log = GroupLog(tmp_path, None, {})
    with os.fdopen(read_end, "rb") as pipe:
        thread = pump(log, "api", pipe)
        os.write(write_end, b"caf\xc3\xa9\r\n\xff\nno newline")
        os.close(write_end)
        thread.join()
    log.close()
    assert log.recent("api") == ["café", "\ufffd", "no newline"]


def test_many_writers_keep_their_lines_whole(tmp_path: Path) -> None:
    terminal = io.StringIO()
    log = GroupLog(tmp_path, terminal, {})

    def write(name: str) -> None:
        for _ in range(200):
            log.add(name, name * 50)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert sorted(lines_of(terminal)) == sorted(f"{name:<6} | {name * 50}" for name in "abc" * 200)


class TestFollower:
    """The engine appends to its own log, replaces it when it is long, and may not have one yet."""

    def follow(self, folder: Path) -> tuple[FileFollower, io.StringIO]:
        terminal = io.StringIO()
        log = GroupLog(folder / "logs", terminal, {})
        return FileFollower(log, "engine", folder / "engine.log"), terminal

    def test_old_lines_are_not_shown(self, tmp_path: Path) -> None:
        (tmp_path / "engine.log").write_text("old\n")
        follower, terminal = self.follow(tmp_path)
        with (tmp_path / "engine.log").open("a") as file:
            file.write("new\npart")
            file.flush()
            follower.read_new()
            assert lines_of(terminal) == ["engine | new"]
            file.write("ial\n")
        follower.read_new()
        assert lines_of(terminal) == ["engine | new", "engine | partial"]

    def test_a_file_that_comes_later_is_shown_whole(self, tmp_path: Path) -> None:
        follower, terminal = self.follow(tmp_path)
        follower.read_new()
        (tmp_path / "engine.log").write_text("first\nsecond\n")
        follower.read_new()
        assert lines_of(terminal) == ["engine | first", "engine | second"]

    def test_a_replaced_file_is_read_from_its_start(self, tmp_path: Path) -> None:
        (tmp_path / "engine.log").write_text("a long old line\n")
        follower, terminal = self.follow(tmp_path)
        (tmp_path / "engine.log").rename(tmp_path / "engine.log.1")
        (tmp_path / "engine.log").write_text("a new and longer line\n")
        follower.read_new()
        assert lines_of(terminal) == ["engine | a new and longer line"]

    def test_a_cut_file_is_read_from_its_start(self, tmp_path: Path) -> None:
        (tmp_path / "engine.log").write_text("a long old line\n")
        follower, terminal = self.follow(tmp_path)
        (tmp_path / "engine.log").write_text("short\n")
        follower.read_new()
        assert lines_of(terminal) == ["engine | short"]

    def test_stopping_shows_the_last_lines(self, tmp_path: Path) -> None:
        follower, terminal = self.follow(tmp_path)
        follower.start()
        (tmp_path / "engine.log").write_text("last\n")
        follower.stop()
        assert lines_of(terminal) == ["engine | last"]
