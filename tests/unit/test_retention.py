"""What may be deleted: the rules alone."""

from dataclasses import replace

import pytest

from vllm_batch_dagster.core.models import DAY_SECONDS, Batch
from vllm_batch_dagster.core.retention import (
    MOST_NAMES,
    Kind,
    RetentionReport,
    RetentionRules,
    Tally,
    are_plausible,
    ended_at,
    held_files,
    is_due,
    is_past,
)
from vllm_batch_dagster.core.states import TERMINAL, TIMESTAMP_FIELD, BatchStatus

NOW = 1_800_000_000.0
ENDED = int(NOW) - 40 * DAY_SECONDS
LASTING = {"file-in": None, "file-out": None, "file-err": None}


def a_batch(status: BatchStatus = BatchStatus.COMPLETED, end: int = ENDED, **fields: object) -> Batch:
    created = end - 60
    batch = Batch("batch_1", "file-in", "/v1/embeddings", "24h", status, created, created + DAY_SECONDS)
    batch = replace(batch, output_file_id="file-out", error_file_id="file-err")
    return replace(batch, **{TIMESTAMP_FIELD.get(status, "in_progress_at"): end, **fields})  # type: ignore[arg-type]


def due(batch: Batch, expiries: dict[str, int | None] | None = None, days: int = 30) -> bool:
    return is_due(batch, LASTING if expiries is None else expiries, RetentionRules(batch_days=days), NOW)


class TestBatchData:
    @pytest.mark.parametrize("status", sorted(TERMINAL))
    def test_goes_so_many_days_after_the_end(self, status: BatchStatus) -> None:
        limit = int(NOW) - 30 * DAY_SECONDS
        assert due(a_batch(status, limit))
        assert not due(a_batch(status, limit + 1))

    @pytest.mark.parametrize("status", sorted(set(BatchStatus) - TERMINAL))
    def test_of_an_open_batch_stays_however_old_it_is(self, status: BatchStatus) -> None:
        assert ended_at(a_batch(status)) is None
        assert not due(a_batch(status), {})

    def test_of_a_stale_batch_stays(self) -> None:
        assert not due(a_batch(result_version=3, merged_version=2), {})

    def test_goes_once(self) -> None:
        assert not due(a_batch(purged_at=ENDED), {})

    @pytest.mark.parametrize(
        ("expiries", "goes"),
        [
            ({}, True),
            ({"file-in": None}, False),
            ({"file-out": int(NOW) + 1}, False),
            ({"file-err": int(NOW) - 30}, False),
            ({"file-out": int(NOW) - 60, "file-in": int(NOW) - 3600}, True),
        ],
    )
    def test_goes_earlier_when_none_of_its_files_is_left(self, expiries: dict[str, int | None], goes: bool) -> None:
        recent = a_batch(end=int(NOW) - DAY_SECONDS)
        assert due(recent, expiries) is goes
        assert due(recent, expiries, days=0) is goes

    def test_stays_a_day_in_any_case(self) -> None:
        """Whoever looks why a batch failed, whose input did not exist, finds its run in Dagster."""
        just = a_batch(BatchStatus.FAILED, int(NOW) - DAY_SECONDS + 1, output_file_id=None, error_file_id=None)
        assert not due(just, {})
        assert due(replace(just, failed_at=int(NOW) - DAY_SECONDS), {})

    def test_zero_days_is_no_limit(self) -> None:
        assert not due(a_batch(end=ENDED), days=0)


def test_a_file_is_past_a_minute_after_it_expired() -> None:
    """A batch that was created in the last second of its input is in the store by then, and holds the file."""
    assert not is_past(None, NOW)
    assert not is_past(int(NOW) - 59, NOW)
    assert is_past(int(NOW) - 60, NOW)


def test_a_batch_holds_all_its_files() -> None:
    batches = [a_batch(), a_batch(input_file_id="file-2", output_file_id=None, error_file_id=None)]
    assert held_files(batches) == {"file-in", "file-out", "file-err", "file-2"}


@pytest.mark.parametrize(
    ("orphans", "total", "plausible"),
    [(0, 0, True), (10, 10, True), (11, 22, True), (11, 21, False), (900, 901, False)],
)
def test_when_most_has_no_record_the_records_are_what_is_missing(orphans: int, total: int, plausible: bool) -> None:
    assert are_plausible(orphans, total) is plausible


def test_a_report_counts_what_goes_apart_from_what_stays() -> None:
    report = RetentionReport()
    report.of(Kind.MISSING_CONTENTS).add("file-1", 100)
    assert (report.is_empty, report.bytes_freed) == (True, 0)
    report.of(Kind.DAGSTER_RUNS).add("batch_1", 7, count=3)
    assert (report.is_empty, report.bytes_freed, report.of(Kind.DAGSTER_RUNS).count) == (False, 7, 3)


def test_a_tally_keeps_few_names() -> None:
    tally = Tally()
    for number in range(1_000):
        tally.add(str(number), 2)
    assert (tally.count, tally.bytes, len(tally.names)) == (1_000, 2_000, MOST_NAMES)
