"""One pass of retention: what processes that died left behind, what a dry run says, and a death of the pass itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import Rig
from tests.unit.house import EVERYTHING, House, counts
from vllm_batch_dagster.core.errors import StateConflict, StorageFailure
from vllm_batch_dagster.core.retention import Kind, RetentionRules


@pytest.fixture
def house(rig: Rig) -> House:
    return House(rig)


class TestLeftovers:
    def test_contents_without_a_record_go_when_they_are_a_day_old(self, house: House) -> None:
        known = house.rig.upload(b"x")
        house.age(house.rig.folder / "files" / known, 9)
        house.lay("files/file-old", 1.1)
        house.lay("files/file-new", 0.9)
        house.lay("files/part-other", 9)
        assert house.sweep().of(Kind.ORPHANS).names == ["file-old"]
        assert {path.name for path in (house.rig.folder / "files").iterdir()} - {".tmp"} == {
            known,
            "file-new",
            "part-other",
        }

    def test_half_written_files_go_when_nobody_has_written_for_a_day(self, house: House) -> None:
        house.lay("files/.tmp/file-1.aa", 1.1)
        writing = house.lay("files/.tmp/file-2.bb", 0.2)
        assert house.sweep().of(Kind.DRAFTS).names == ["file-1.aa"]
        assert writing.exists()

    def test_the_folder_of_a_batch_that_nobody_knows(self, house: House) -> None:
        house.age(house.lay("batches/batch_x/index.bin").parent, 2)
        house.lay("batches/batch_y/index.bin")
        assert house.sweep().of(Kind.ORPHANS).names == ["batch_x"]
        assert house.folders() == {"batch_y"}

    async def test_the_folder_of_a_batch_whose_purge_was_cut(self, house: House) -> None:
        """The chunks went from the store, and then the process was gone. The batch is known, and it is a day too young
        for anybody to guess that nobody needs its folder."""
        batch_id = await house.completed()
        house.rig.store.retention.purge(batch_id, int(house.rig.clock()))
        assert house.sweep(dry_run=True).of(Kind.BATCH_DATA).names == [batch_id]
        assert house.sweep().of(Kind.BATCH_DATA).names == [batch_id]
        assert house.folders() == set()

    def test_an_empty_store_beside_full_folders_deletes_nothing(self, house: House) -> None:
        """POSTGRES_HOST was forgotten, say: all contents look like leftovers."""
        for number in range(30):
            house.lay(f"files/file-{number}", 9)
            house.age(house.lay(f"batches/batch_{number}/index.bin").parent, 9)
        report = house.sweep()
        assert counts(report) == {Kind.DOUBTFUL_ORPHANS: 60}
        assert (len(house.stored()), len(house.folders())) == (30, 30)
        assert counts(house.sweep(trust_store=True)) == {Kind.ORPHANS: 60}
        assert (house.stored(), house.folders()) == (set(), set())

    def test_what_the_disk_does_not_let_go_holds_up_nothing_else(self, house: House) -> None:
        first, second = house.rig.upload(b"x", expires_at=1), house.rig.upload(b"y", expires_at=1)
        (house.rig.folder / "files" / first).unlink()
        (house.rig.folder / "files" / first).mkdir()
        report = house.sweep()
        assert report.of(Kind.REFUSED).names == [first]
        assert report.of(Kind.EXPIRED_FILES).names == [second]

    def test_runs_that_never_started_are_only_reported(self, house: House) -> None:
        house.graph.zombies = ["run-1"]
        report = house.sweep()
        assert (report.of(Kind.STUCK_RUNS).names, report.is_empty) == (["run-1"], True)


class TestDryRun:
    async def test_says_what_the_real_one_does_and_changes_nothing(self, house: House) -> None:
        await house.completed()
        house.rig.start(3)
        house.lay("files/file-old", 0)
        house.lay("datasets/curated/batch=batch_2/part")
        house.later(35)
        before = house.everything()
        foretold = house.sweep(EVERYTHING, dry_run=True)
        assert house.everything() == before
        done = house.sweep(EVERYTHING)
        assert foretold.dry_run
        assert foretold.tallies == done.tallies
        assert Kind.BATCH_DATA in counts(done)

    async def test_a_batch_whose_last_files_expire_in_this_very_pass(self, house: House) -> None:
        batch_id = await house.completed()
        house.rig.store.files.delete(house.rig.batch(batch_id).input_file_id)
        house.later(30.5)
        rules = RetentionRules(batch_days=300)
        foretold = house.sweep(rules, dry_run=True)
        assert foretold.of(Kind.BATCH_DATA).names == [batch_id]
        assert counts(foretold)[Kind.EXPIRED_FILES] == 1
        assert counts(house.sweep(rules))[Kind.BATCH_DATA] == 1


class Killed(BaseException):
    """The process is gone: nothing catches this."""


class Fuse:
    """Kills before the n-th effect."""

    def __init__(self, after: int) -> None:
        self.left = after

    def guard(self, effect: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                raise Killed
            self.left -= 1
            return effect(*arguments, **options)

        return guarded


EFFECTS = 40


async def test_a_death_anywhere_leaves_what_the_next_pass_finishes(tmp_path: Path) -> None:
    """Killed before each of its effects in turn: no record without contents, and the second pass ends where an
    undisturbed one does."""
    finals = set()
    for step in range(EFFECTS):
        house = House(Rig(tmp_path / str(step)))
        await house.completed()
        house.cancelled()
        house.rig.start(3)
        house.rig.upload(b"x", expires_at=1)
        house.lay("files/file-old")
        house.lay("files/.tmp/file-draft.aa")
        house.later(100)
        fuse, store = Fuse(step), house.rig.store
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (
                (store.files, "delete"),
                (house.files, "delete"),
                (house.graph, "forget"),
                (store.retention, "purge"),
                (store.retention, "forget"),
                (house.disk, "remove"),
            ):
                patch.setattr(owner, name, fuse.guard(getattr(owner, name)))
            try:
                house.sweep()
                was_killed = False
            except Killed:
                was_killed = True
        assert house.recorded() <= house.stored(), "no record without contents"
        for batch in store.batches.list(limit=100).data:
            assert batch.purged_at or batch.id in house.folders(), "no batch that lost its folder unnoticed"
        house.sweep()
        folders, stored, recorded, batches = house.everything()
        finals.add((frozenset(folders), frozenset(stored), frozenset(recorded), tuple(batch.id for batch in batches)))
        if not was_killed:
            break
    assert not was_killed, "there are more effects than steps"
    assert step > 10
    assert len(finals) == 1
    ((folders, stored, recorded, batches),) = finals
    assert len(folders) == len(batches) == 1, "the open batch"
    assert stored == recorded


def test_a_store_that_cannot_be_used_ends_the_pass(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_asked: object) -> None:
        raise StorageFailure("the batch store could not be used")

    monkeypatch.setattr(house.rig.store.retention, "files", fail)
    with pytest.raises(StorageFailure):
        house.sweep()


def test_a_batch_that_was_purged_by_another_pass(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes at once, the scheduled one and `gc`: the slower one finds nothing left to do."""
    batch_id = house.cancelled()
    house.later(31)
    house.graph.while_forgetting = lambda _batch: monkeypatch.setattr(house.graph, "while_forgetting", lambda _b: None)
    purge = house.rig.store.retention.purge

    def purge_after_the_other(batch_id: str, now: int) -> None:
        purge(batch_id, now)
        house.disk.remove(house.disk.batch(batch_id))  # type: ignore[arg-type]
        purge(batch_id, now)

    monkeypatch.setattr(house.rig.store.retention, "purge", purge_after_the_other)
    assert house.sweep().of(Kind.BATCH_DATA).names == [batch_id]
    assert house.folders() == set()
    with pytest.raises(StateConflict):
        house.rig.store.retention.forget(house.rig.start(1))
