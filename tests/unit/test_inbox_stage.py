"""Files that are dropped into a real folder become batches, once each, wherever a pass is cut."""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import CHAT, Rig, request_lines
from vllm_batch_dagster.adapters.drop_folder import LocalDropFolder
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.stages import publication
from vllm_batch_dagster.stages.inbox import STUCK, InboxPorts, InboxTally, ingest, settle

LONG_AGO = 1_000_000.0


class Inbox:
    """A drop folder beside an installation. `drop` makes a file that looks as if it had lain there for long."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig, self.folder = rig, folder
        # A file that was written just now is at rest in an hour: not while a slow machine runs the test.
        self.local = LocalDropFolder(folder, settle_seconds=3600)
        self.local.create()
        self.ports = InboxPorts(self.local, rig.store, rig.files, rig.clock, secrets.token_bytes)

    def drop(self, name: str, content: bytes | int = 3, order: str | None = None) -> None:
        if order is not None:
            self._write(Path(name).with_suffix(".yaml").name, order.encode())
        self._write(name, request_lines(content) if isinstance(content, int) else content)

    def _write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)
        os.utime(self.folder / name, (LONG_AGO, LONG_AGO))

    def ingest(self) -> InboxTally:
        return ingest(self.ports, lambda _sentence: None)

    def settle(self) -> InboxTally:
        return settle(self.ports)

    def validate_all(self) -> None:
        for batch in self.batches():
            if batch.status is BatchStatus.VALIDATING:
                self.rig.validate(batch.id)

    def run(self) -> None:
        self.ingest()
        self.validate_all()
        self.settle()

    def batches(self) -> list[Batch]:
        return list(self.rig.store.batches.list(limit=5000).data)

    def ended(self, where: str) -> dict[str, Path]:
        """The folders of the drops that ended there, by the name of the file."""
        found = {}
        for folder in (self.folder / where).iterdir():
            (dropped,) = folder.glob("*.jsonl")
            assert dropped.name not in found
            found[dropped.name] = folder
        return found

    def outside(self) -> set[str]:
        return {path.name for path in self.folder.iterdir() if path.is_file() and not path.name.startswith(".")}

    def report(self, where: str, name: str) -> str:
        return (self.ended(where)[name] / "report.md").read_text()


@pytest.fixture
def inbox(rig: Rig, tmp_path: Path) -> Inbox:
    return Inbox(rig, tmp_path / "inbox")


def test_a_dropped_file_becomes_a_batch_and_is_done(inbox: Inbox) -> None:
    inbox.drop("questions.jsonl")
    inbox.ingest()
    (batch,) = inbox.batches()
    assert (batch.endpoint, batch.completion_window, batch.status) == (CHAT, "24h", BatchStatus.VALIDATING)
    assert inbox.rig.stored_lines(batch.input_file_id) == request_lines(3).splitlines(keepends=True)
    assert inbox.rig.store.files.get(batch.input_file_id).filename == "questions.jsonl"
    assert not inbox.settle().counts, "not judged yet"
    inbox.validate_all()
    inbox.settle()
    report = inbox.report("done", "questions.jsonl")
    assert batch.id in report
    assert "requests: 3" in report
    assert not inbox.outside()
    assert not inbox.settle().is_due


def test_an_order_goes_with_its_file(inbox: Inbox) -> None:
    inbox.drop("a.jsonl", order="project: search\nmetadata: {team: 7}\nhandlers: [directory]\n")
    inbox.drop("b.jsonl")
    inbox.run()
    by_project = {batch.project_id: batch for batch in inbox.batches()}
    assert by_project["search"].metadata == {"team": "7", "handlers": "directory"}
    assert by_project["default"].metadata == {}
    assert inbox.rig.store.files.get(by_project["search"].input_file_id).project_id == "search"
    assert (inbox.ended("done")["a.jsonl"] / "a.yaml").exists()


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("endpoint: /v1/nothing\n", "/v1/nothing"),
        ("completion_window: 3 weeks\n", "completion_window"),
        ("window: 24h\n", "window"),
        ("a: [", "no YAML"),
        ("a: " + "x" * 70_000, "larger"),
        ("metadata: {webhook_url: 'ftp://x'}\n", "webhook_url"),
    ],
)
def test_a_wrong_order_is_rejected_before_anything_is_made(inbox: Inbox, order: str, reason: str) -> None:
    inbox.drop("a.jsonl", order=order)
    inbox.ingest()
    assert not inbox.batches()
    report = inbox.report("rejected", "a.jsonl")
    assert reason in report
    assert "drop the file again" in report
    assert (inbox.ended("rejected")["a.jsonl"] / "a.yaml").exists()


def test_a_file_with_bad_lines_is_rejected_with_all_of_them(inbox: Inbox) -> None:
    inbox.drop("a.jsonl", request_lines(2) + b"no json\n" + b'{"custom_id": "x"}\n')
    inbox.run()
    report = inbox.report("rejected", "a.jsonl")
    assert "line 3" in report
    assert "line 4" in report
    (batch,) = inbox.batches()
    assert batch.id in report
    assert batch.status is BatchStatus.FAILED


def test_an_empty_file_is_rejected(inbox: Inbox) -> None:
    inbox.drop("empty.jsonl", b"")
    inbox.run()
    assert "rejected" in inbox.report("rejected", "empty.jsonl")


def test_a_file_that_is_too_large_is_rejected(inbox: Inbox) -> None:
    inbox.ports = replace(inbox.ports, max_bytes=100)
    inbox.drop("a.jsonl")
    inbox.run()
    assert "MAX_FILE_BYTES" in inbox.report("rejected", "a.jsonl")
    assert not inbox.rig.store.files.list(purpose=None, after=None, limit=5, order="desc").data


def test_a_link_is_left_alone(inbox: Inbox, tmp_path: Path) -> None:
    """It could show any file of this machine to whoever may drop."""
    secret = tmp_path / "secret.jsonl"
    secret.write_bytes(request_lines(1))
    (inbox.folder / "a.jsonl").symlink_to(secret)
    inbox.ingest()
    assert not inbox.batches()
    assert not inbox.settle().is_due


def test_a_file_is_taken_when_it_has_come_to_rest(inbox: Inbox) -> None:
    path = inbox.folder / "a.jsonl"
    path.write_bytes(request_lines(1))
    inbox.ingest()
    assert not inbox.batches()
    os.utime(path, (LONG_AGO, LONG_AGO))
    inbox.ingest()
    assert len(inbox.batches()) == 1


def test_a_file_that_is_open_for_writing_is_not_taken(inbox: Inbox) -> None:
    """However long the writer pauses."""
    path = inbox.folder / "a.jsonl"
    with path.open("wb") as writer:
        writer.write(request_lines(1))
        writer.flush()
        os.utime(path, (LONG_AGO, LONG_AGO))
        inbox.ingest()
        assert not inbox.batches()
    os.utime(path, (LONG_AGO, LONG_AGO))
    inbox.ingest()
    assert len(inbox.batches()) == 1


def test_an_order_that_is_still_coming_holds_its_file_back(inbox: Inbox) -> None:
    inbox.drop("a.jsonl")
    (inbox.folder / "a.yaml").write_text("metadata: {late: yes}\n")
    inbox.ingest()
    assert not inbox.batches()
    os.utime(inbox.folder / "a.yaml", (LONG_AGO, LONG_AGO))
    inbox.ingest()
    assert [batch.metadata for batch in inbox.batches()] == [{"late": "true"}]


def test_the_same_name_again_is_another_batch(inbox: Inbox) -> None:
    for _ in range(2):
        inbox.drop("a.jsonl")
        inbox.ingest()
    assert len(inbox.batches()) == 2


def test_a_drop_that_cannot_be_stored_holds_up_no_other(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox.drop("a.jsonl")
    inbox.drop("b.jsonl")
    add, refused = inbox.rig.store.files.add, []

    def refuse_first(file: Any, **options: Any) -> str:
        if not refused:
            refused.append(file)
            raise StorageFailure("the disk is full")
        return add(file, **options)

    monkeypatch.setattr(inbox.rig.store.files, "add", refuse_first)
    tally = inbox.ingest()
    assert tally.counts[STUCK] == 1
    assert "the disk is full" in tally.named[STUCK][0]
    assert len(inbox.batches()) == 1
    assert inbox.settle().is_due
    inbox.run()
    assert sorted(inbox.ended("done")) == ["a.jsonl", "b.jsonl"]


def test_two_passes_at_once_take_nothing_twice(inbox: Inbox) -> None:
    for number in range(40):
        inbox.drop(f"{number}.jsonl", 1)
    others = [Inbox(inbox.rig, inbox.folder) for _ in range(3)]
    threads = [threading.Thread(target=lambda each=each: [each.ingest() for _ in range(5)]) for each in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    inbox.run()
    assert len(inbox.batches()) == len(inbox.ended("done")) == 40


class Death(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


class Fate:
    """Lets a process die at the n-th of all its effects."""

    def __init__(self, effect: int) -> None:
        self.left = effect

    def wrap(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def doomed(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            result = work(*args, **kwargs)
            self._pass()
            return result

        return doomed

    def _pass(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Death


def die_at(effect: int, inbox: Inbox) -> bool:
    """Run to the end, dying once at that effect. True when the run had so many."""
    fate = Fate(effect)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", fate.wrap(Path.replace))
        patch.setattr(publication, "sync_folder", fate.wrap(publication.sync_folder))
        for records in (inbox.rig.store.files, inbox.rig.store.batches):
            patch.setattr(records, "add", fate.wrap(records.add))
        try:
            inbox.run()
        except Death:
            return True
        return False


@pytest.fixture
def inboxes(tmp_path: Path) -> Iterator[Callable[[int], Inbox]]:
    def make(number: int) -> Inbox:
        return Inbox(Rig(tmp_path / f"rig{number}"), tmp_path / f"inbox{number}")

    return make


def test_whatever_dies_a_file_is_one_batch_and_ends_once(inboxes: Callable[[int], Inbox]) -> None:
    effect, deaths = 0, True
    while deaths:
        effect += 1
        inbox = inboxes(effect)
        inbox.drop("good.jsonl", order="metadata: {a: b}\n")
        inbox.drop("bad.jsonl", b"no json\n")
        inbox.drop("wrong.jsonl", order="window: 24h\n")
        deaths = die_at(effect, inbox)
        inbox.run()
        inbox.run()
        assert sorted(batch.status for batch in inbox.batches()) == ["failed", "in_progress"], effect
        assert [batch.metadata for batch in inbox.batches() if batch.counts.total] == [{"a": "b"}], effect
        assert list(inbox.ended("done")) == ["good.jsonl"], effect
        assert sorted(inbox.ended("rejected")) == ["bad.jsonl", "wrong.jsonl"], effect
        assert "window" in inbox.report("rejected", "wrong.jsonl"), effect
        assert not inbox.outside(), effect
    assert effect > 40, "deaths that were tried"


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_thousand_files_at_once_half_of_them_still_being_written(inbox: Inbox) -> None:
    """Each good one becomes exactly one batch, each bad one a readable report."""
    inbox.local = LocalDropFolder(inbox.folder, settle_seconds=0.3)
    inbox.ports = replace(inbox.ports, folder=inbox.local)
    good, bad = request_lines(3), request_lines(1) + b"{broken\n"
    names = [f"{number:04d}-{'good' if number % 5 else 'bad'}.jsonl" for number in range(1000)]
    for name in names[::2]:
        (inbox.folder / f".{name}").write_bytes(good if "good" in name else bad)
        (inbox.folder / f".{name}").rename(inbox.folder / name)
    writers = threading.Thread(target=write_slowly, args=(inbox.folder, names[1::2], good, bad))
    writers.start()
    while writers.is_alive() or inbox.outside():
        inbox.ingest()
        time.sleep(0.05)
    writers.join()
    inbox.run()
    done, rejected = inbox.ended("done"), inbox.ended("rejected")
    assert sorted(done) == sorted(name for name in names if "good" in name)
    assert sorted(rejected) == sorted(name for name in names if "bad" in name)
    assert len(inbox.batches()) == 1000
    assert all(batch.counts.total == 3 for batch in inbox.batches() if batch.status is not BatchStatus.FAILED)
    assert all("line 2" in (folder / "report.md").read_text() for folder in rejected.values())


def write_slowly(folder: Path, names: list[str], good: bytes, bad: bytes) -> None:
    """Write files in groups that are all open at once, each in three pieces with a pause longer than the rest."""
    for group in (names[:250], names[250:]):
        files = [((folder / name).open("wb"), good if "good" in name else bad) for name in group]
        for part in range(3):
            for file, content in files:
                size = len(content)
                file.write(content[size * part // 3 : size * (part + 1) // 3])
                file.flush()
            time.sleep(0.5)
        for file, _content in files:
            file.close()
