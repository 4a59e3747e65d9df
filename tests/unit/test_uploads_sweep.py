"""The sweep of uploads (stages/uploads.py): what is overdue, closed, or left by a killed completion."""

import errno
from pathlib import Path

import pytest

from tests.unit.upload_desk import Desk, Killed, kill_at, no_cleaning
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.stages.uploads import REMEMBERED_SECONDS, complete_upload, find_upload, sweep_uploads

HOUR = 3600


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "files")


def test_parts_that_cannot_be_removed_wait_for_the_sweep(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, wanted = desk.fill()

    def refuse(path: Path, *, missing_ok: bool) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        file = desk.complete(upload, wanted)
        assert sweep_uploads(desk.store, desk.files, desk.clock()).failed == (upload.id,)
    assert desk.status(upload) == "completed"
    assert len(desk.stored) == 3

    report = sweep_uploads(desk.store, desk.files, desk.clock())
    assert (report.cleared, report.failed, report.bytes) == ((upload.id,), (), 6)
    assert desk.stored == [file.id]


def test_the_sweep_expires_clears_and_forgets(desk: Desk) -> None:
    overdue, _ = desk.fill()
    done, wanted = desk.fill()
    file = desk.complete(done, wanted)
    desk.clock.advance(HOUR - 1)
    fresh, _ = desk.fill()
    parts_of_fresh = [name for name in desk.stored if fresh.id in name]
    assert sweep_uploads(desk.store, desk.files, desk.clock()) == sweep_uploads(desk.store, desk.files, 0)

    desk.clock.advance(1)
    looked = sweep_uploads(desk.store, desk.files, desk.clock(), dry_run=True)
    assert desk.status(overdue) == "pending"
    swept = sweep_uploads(desk.store, desk.files, desk.clock())

    assert looked == swept
    assert (swept.expired, swept.cleared, swept.forgotten, swept.bytes) == ((overdue.id,), (overdue.id,), (), 6)
    assert desk.status(overdue) == "expired"
    assert desk.stored == sorted([*parts_of_fresh, file.id])

    desk.clock.advance(REMEMBERED_SECONDS)
    assert sweep_uploads(desk.store, desk.files, desk.clock()).forgotten == (overdue.id, done.id, fresh.id)
    assert desk.stored == [file.id]
    for upload in (overdue, done, fresh):
        with pytest.raises(NotFound):
            find_upload(upload.id, desk.ports)
    assert desk.read(file) == b"abcdef"


def test_the_sweep_removes_what_a_killed_completion_wrote(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, wanted = desk.fill()
    with monkeypatch.context() as patch:
        no_cleaning(patch)
        kill_at(patch, desk.store.uploads, "complete")
        with pytest.raises(Killed):
            desk.complete(upload, wanted)
    assert len(desk.stored) == 3

    desk.clock.advance(HOUR)
    sweep_uploads(desk.store, desk.files, desk.clock())
    assert desk.stored == []


def test_the_sweep_leaves_what_is_completed_at_this_moment(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, wanted = desk.fill()
    stale = desk.store.uploads.stale

    def complete_first(*args: int) -> object:
        found = stale(*args)
        complete_upload(upload, wanted, desk.ports)
        return found

    monkeypatch.setattr(desk.store.uploads, "stale", complete_first)
    sweep_uploads(desk.store, desk.files, desk.clock() + HOUR)
    assert desk.status(upload) == "completed"
    assert len(desk.stored) == 1
