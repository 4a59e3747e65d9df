"""Handlers: found by entry-point group; a broken one is only reported; the built-in one delivers whole files."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from handlers import registry
from handlers.base import ResultHandler, Results
from handlers.directory import DirectoryHandler
from handlers.registry import BrokenHandler, load_handlers

LINES = [b'{"custom_id":"a"}\n', b'{"custom_id":"b"}\n']


def results() -> Results:
    def read() -> Iterator[bytes]:
        return iter(LINES)

    return Results(read)


def test_the_built_in_handler_is_found_through_its_entry_point() -> None:
    found = [handler for handler in load_handlers() if isinstance(handler, ResultHandler)]
    assert "directory" in [handler.name() for handler in found]


def test_a_broken_handler_is_reported_and_the_others_load(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("missing", "no_such_module:Handler", registry.GROUP),
        EntryPoint("wrong", "pathlib:Path", registry.GROUP),
        EntryPoint("directory", "handlers.directory:DirectoryHandler", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    good, missing, wrong = load_handlers()
    assert isinstance(good, DirectoryHandler)
    assert isinstance(missing, BrokenHandler)
    assert "no_such_module" in missing.problem
    assert isinstance(wrong, BrokenHandler)
    assert "not a ResultHandler" in wrong.problem


def test_results_can_be_read_twice() -> None:
    shown = results()
    assert [row["custom_id"] for row in shown] == ["a", "b"]
    assert [row["custom_id"] for row in shown] == ["a", "b"]


def test_the_directory_handler_writes_one_whole_file_and_replaces_it(tmp_path: Path) -> None:
    handler = DirectoryHandler(str(tmp_path / "out"))
    for _ in range(2):
        assert handler.handle("batch_1", results(), {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["batch_1.jsonl"]
    assert (tmp_path / "out" / "batch_1.jsonl").read_bytes() == b"".join(LINES)


def test_the_directory_handler_is_off_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELIVERY_FOLDER", raising=False)
    assert not DirectoryHandler().enabled()
