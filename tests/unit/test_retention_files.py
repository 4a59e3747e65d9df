"""One pass of retention: which files and which batch data go, and which stay."""

from typing import Any

import pytest

from tests.unit.conftest import Rig
from tests.unit.house import EVERYTHING, House, counts
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import DAY_SECONDS
from vllm_batch_dagster.core.retention import Kind, RetentionRules
from vllm_batch_dagster.core.states import BatchEvent


@pytest.fixture
def house(rig: Rig) -> House:
    return House(rig)


class TestFiles:
    def test_an_expired_one_goes_with_its_contents(self, house: House) -> None:
        now = int(house.rig.clock())
        gone = house.rig.upload(b"x" * 10, expires_at=now + 3600)
        stays = [house.rig.upload(b"y"), house.rig.upload(b"z", expires_at=now + 2 * DAY_SECONDS)]
        assert counts(house.sweep()) == {}
        house.later(1)
        report = house.sweep()

        assert counts(report) == {Kind.EXPIRED_FILES: 1}
        assert (report.bytes_freed, report.of(Kind.EXPIRED_FILES).names) == (10, [gone])
        assert house.stored() == house.recorded() == set(stays)

    def test_more_than_a_page(self, house: House) -> None:
        for _ in range(3):
            house.rig.upload(b"x", expires_at=1)
        held = house.rig.create(house.rig.upload(b"x", expires_at=1))
        for _ in range(1_200):
            house.rig.upload(b"x", expires_at=1)
        assert counts(house.sweep()) == {Kind.EXPIRED_FILES: 1_203, Kind.HELD_FILES: 1}
        assert house.stored() == {house.rig.batch(held).input_file_id}

    def test_the_input_of_an_open_batch_stays_until_it_has_ended(self, house: House) -> None:
        file_id = house.rig.upload(b"{}\n", expires_at=int(house.rig.clock()) + 3600)
        batch_id = house.rig.create(file_id)
        house.later(0.5)
        assert counts(house.sweep()) == {Kind.HELD_FILES: 1}
        assert house.stored() == {file_id}
        house.rig.store.batches.advance(batch_id, BatchEvent.INVALID, int(house.rig.clock()))
        assert counts(house.sweep()) == {Kind.EXPIRED_FILES: 1}

    async def test_the_files_of_a_stale_batch_stay(self, house: House) -> None:
        """A chunk was run again; its merge is due."""
        batch_id = await house.completed()
        attempt = house.rig.begin(batch_id, fresh=True)
        attempt.close()
        attempt.publish(reason="engine_failure")
        house.later(31)
        assert house.rig.batch(batch_id).is_stale
        report = house.sweep()
        assert Kind.BATCH_DATA not in counts(report)
        assert report.of(Kind.HELD_FILES).names == [house.rig.batch(batch_id).output_file_id]

    async def test_the_files_of_a_batch_with_a_run_stay(self, house: House) -> None:
        batch_id = await house.completed()
        house.later(31)
        house.graph.active.add(batch_id)
        assert counts(house.sweep()) == {Kind.HELD_FILES: 1, Kind.BUSY_BATCHES: 1}
        house.graph.active.clear()
        assert Kind.EXPIRED_FILES in counts(house.sweep())

    def test_one_that_its_owner_deletes_meanwhile(self, house: House) -> None:
        file_id = house.rig.upload(b"x", expires_at=1)
        listing = house.rig.store.retention.files

        def list_then_delete(**asked: Any) -> Any:
            found = listing(**asked)
            if found and asked.get("expired_by") and file_id in house.recorded():
                house.rig.store.files.delete(file_id)
            return found

        house.rig.store.retention.files = list_then_delete  # type: ignore[method-assign]
        assert Kind.EXPIRED_FILES not in counts(house.sweep())

    def test_one_that_is_deleted_during_the_look_for_contents_is_not_missing(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file_id = house.rig.upload(b"x")

        def look_too_late(asked: str) -> bool:
            house.rig.store.files.delete(asked)
            house.files.delete(asked)
            return False

        monkeypatch.setattr(house.disk, "has_contents", look_too_late)
        assert counts(house.sweep()) == {}
        assert file_id not in house.recorded()

    def test_a_record_without_contents_is_reported_and_left(self, house: House) -> None:
        file_id = house.rig.upload(b"x")
        house.files.delete(file_id)
        for _ in range(2):
            report = house.sweep()
            assert report.of(Kind.MISSING_CONTENTS).names == [file_id]
            assert report.is_empty
        assert house.recorded() == {file_id}


class TestUploads:
    def test_expired_ones_go_with_their_parts_and_are_forgotten_the_day_after(self, house: House) -> None:
        upload, parts = house.upload(b"one part"), house.rig.folder / "files" / ".parts"
        assert house.sweep().is_empty
        house.later(0.1)
        foretold = house.sweep(dry_run=True)
        assert len(list(parts.iterdir())) == 1
        report = house.sweep()
        assert report.tallies == foretold.tallies
        assert report.of(Kind.EXPIRED_UPLOADS).names == [upload]
        assert report.bytes_freed == 8
        assert list(parts.iterdir()) == []
        assert house.rig.store.uploads.get(upload).status.value == "expired"
        assert house.sweep().is_empty
        house.later(1)
        assert counts(house.sweep()) == {Kind.EXPIRED_UPLOADS: 1}
        with pytest.raises(NotFound):
            house.rig.store.uploads.get(upload)

    def test_more_than_one_sweep_takes(self, house: House) -> None:
        for _ in range(1_100):
            house.upload()
        house.later(2)
        assert counts(house.sweep()) == {Kind.EXPIRED_UPLOADS: 1_100}
        assert house.sweep().is_empty


class TestBatchData:
    async def test_goes_after_its_days_and_the_batch_can_still_be_read(self, house: House) -> None:
        done, stopped, opened = await house.completed(), house.cancelled(), house.rig.start(3)
        before = house.rig.batch(done)
        house.later(29)
        assert Kind.BATCH_DATA not in counts(house.sweep())
        house.later(1.1)
        report = house.sweep()

        assert sorted(report.of(Kind.BATCH_DATA).names) == sorted([done, stopped])
        assert report.of(Kind.BATCH_DATA).bytes > 0
        assert counts(report)[Kind.DAGSTER_RUNS] == 2
        assert house.folders() == {opened}
        assert not house.rig.store.chunks.list(done)
        after = house.rig.batch(done)
        assert after.purged_at == int(house.rig.clock())
        assert (after.status, after.counts, after.usage) == (before.status, before.counts, before.usage)
        assert house.rig.store.chunks.list(opened)
        assert house.sweep().is_empty

    async def test_goes_a_day_after_the_end_when_all_its_files_are_deleted(self, house: House) -> None:
        """The journals hold every answer: whoever deletes the files wants those gone as well."""
        batch_id, other = await house.completed(), await house.completed()
        batch = house.rig.batch(batch_id)
        for file_id in (batch.input_file_id, str(batch.output_file_id)):
            house.rig.store.files.delete(file_id)
            house.files.delete(file_id)
        assert house.sweep().is_empty
        house.later(1.1)
        assert house.sweep().of(Kind.BATCH_DATA).names == [batch_id]
        assert house.folders() == {other}

    async def test_stays_while_one_of_its_runs_is_unfinished(self, house: House) -> None:
        batch_id = await house.completed()
        house.later(31)
        house.graph.active.add(batch_id)
        report = house.sweep()
        assert report.of(Kind.BUSY_BATCHES).names == [batch_id]
        assert house.folders() == {batch_id}
        assert house.graph.runs == {batch_id: 2}

    async def test_stays_when_somebody_starts_a_run_at_that_moment(self, house: House) -> None:
        batch_id = await house.completed()
        house.later(31)
        house.graph.while_forgetting = house.graph.active.add
        assert house.sweep().of(Kind.BUSY_BATCHES).names == [batch_id]
        assert house.folders() == {batch_id}
        assert house.rig.batch(batch_id).purged_at is None
        house.graph.active.clear()
        house.graph.while_forgetting = lambda batch_id: None
        assert house.sweep().of(Kind.BATCH_DATA).names == [batch_id]

    async def test_stays_when_a_chunk_is_published_at_that_moment(self, house: House) -> None:
        batch_id = await house.completed()
        house.later(31)

        def rerun(batch_id: str) -> None:
            attempt = house.rig.begin(batch_id, fresh=True)
            attempt.close()
            attempt.publish(reason="engine_failure")

        house.graph.while_forgetting = rerun
        assert house.sweep().of(Kind.BUSY_BATCHES).names == [batch_id]
        assert house.folders() == {batch_id}
        assert house.rig.merge(batch_id).counts.total == 7

    async def test_datasets_stay_unless_a_setting_says_otherwise(self, house: House) -> None:
        await house.completed()
        kept = house.lay("datasets/curated/batch=batch_2/part-00000.parquet").parent
        half = house.lay("datasets/curated/batch=batch_9.new/part-00000.parquet").parent
        house.later(100)
        house.sweep(RetentionRules())
        assert kept.exists()
        assert not half.exists()
        house.lay("datasets/curated/batch=batch_9.new/part", 100)
        house.age(half, 100)
        assert house.sweep(RetentionRules(dataset_days=99)).of(Kind.DATASETS).names == ["batch=batch_2"]
        assert not kept.exists()

    async def test_the_record_goes_when_a_setting_says_so(self, house: House) -> None:
        batch_id = await house.completed()
        house.later(61)
        kept = RetentionRules(batch_days=30)
        house.sweep(kept)
        assert house.rig.batch(batch_id).purged_at
        report = house.sweep(EVERYTHING)
        assert report.of(Kind.BATCH_RECORDS).names == [batch_id]
        with pytest.raises(NotFound):
            house.rig.batch(batch_id)
