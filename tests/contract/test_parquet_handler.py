"""The handler `parquet`: the columns, whose results stay, what lies beside the data set, on a disk and on S3."""

import io
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import polars
import pytest

from handlers import frames
from handlers.base import DeliveryFailed
from handlers.buckets import Upload, Written
from handlers.parquet import ParquetHandler
from handlers.settings import HandlerSettings
from handlers.testing import BreakingFile, answered, three_kinds
from tests.contract.object_server import ObjectServer, list_keys, list_unfinished, read_object

OLD = three_kinds("batch_1")
NEW = replace(OLD, output=[*OLD.output, answered("c", "late")], errors=(), version=2)
TEXT, NUMBER = polars.String, polars.Int64
# Written out, not taken from the code: readers depend on each of them.
COLUMNS = {
    **{"custom_id": TEXT, "status": TEXT, "status_code": polars.Int32, "endpoint": TEXT, "model": TEXT},
    **{"answer": TEXT, "finish_reason": TEXT, "input_tokens": NUMBER, "output_tokens": NUMBER, "error_code": TEXT},
    **{"error_message": TEXT, "request_id": TEXT, "response": TEXT, "error": TEXT, "project_id": TEXT},
    **{"version": NUMBER, "ended_at": polars.Datetime("us", "UTC")},
}


class DataSet:
    """A data set of one test, on a disk or in a bucket."""

    def __init__(self, url: str, objects: ObjectServer | None) -> None:
        self.url, self.objects = url, objects
        endpoint = objects.endpoint_url if objects is not None else ""
        self.settings = HandlerSettings(handler_parquet_url=url, handler_s3_endpoint_url=endpoint)

    def make(self) -> ParquetHandler:
        return ParquetHandler(self.settings)

    def read(self, batch_id: str = "batch_1") -> polars.DataFrame:
        return polars.read_parquet(io.BytesIO(self._content(f"results/batch={batch_id}/results.parquet")))

    def marks(self, batch_id: str = "batch_1") -> dict[str, str]:
        return polars.read_parquet_metadata(io.BytesIO(self._content(f"results/batch={batch_id}/results.parquet")))

    def names(self) -> list[str]:
        """Return everything that is there, beside the lock."""
        if self.objects is not None:
            return list_keys(self.objects, self.url) + list_unfinished(self.objects, self.url)
        files = [path for path in Path(self.url).rglob("*") if path.is_file() and path.name != "lock"]
        return sorted(path.relative_to(self.url).as_posix() for path in files)

    def _content(self, name: str) -> bytes:
        if self.objects is not None:
            return read_object(self.objects, self.url, name)
        return (Path(self.url) / name).read_bytes()


@pytest.fixture(params=["disk", "s3"])
def data_set(request: pytest.FixtureRequest, tmp_path: Path) -> DataSet:
    if request.param == "disk":
        return DataSet(str(tmp_path / "out"), None)
    objects: ObjectServer = request.getfixturevalue("objects")
    return DataSet(objects.new_prefix(), objects)


def test_the_columns_and_a_row(data_set: DataSet) -> None:
    data_set.make().deliver(OLD.delivery())
    rows = data_set.read()
    assert dict(rows.schema) == COLUMNS
    good, _, refused, lost = rows.iter_rows(named=True)
    assert (good["custom_id"], good["status"], good["status_code"], good["answer"]) == (
        "a",
        "answered",
        200,
        "an answer",
    )
    assert (good["endpoint"], good["model"], good["project_id"]) == ("/v1/chat/completions", "tiny", "default")
    assert (good["version"], good["ended_at"]) == (1, datetime.fromtimestamp(1_800_000_003, UTC))
    assert '"content": "an answer"' in good["response"]
    assert (refused["status"], refused["status_code"], refused["error_message"]) == ("failed", 400, "too long")
    assert (lost["status"], lost["response"], lost["error_code"]) == ("failed", None, "batch_expired")


def test_the_columns_are_the_same_without_a_single_answer(data_set: DataSet) -> None:
    data_set.make().deliver(replace(OLD, output=()).delivery())
    assert dict(data_set.read().schema) == COLUMNS


def test_a_delivery_without_a_line_makes_a_table_without_a_row(data_set: DataSet) -> None:
    data_set.make().deliver(replace(OLD, output=(), errors=()).delivery())
    assert dict(data_set.read().schema) == COLUMNS
    assert len(data_set.read()) == 0


def test_older_results_never_take_the_place_of_newer_ones(data_set: DataSet) -> None:
    data_set.make().deliver(NEW.delivery())
    data_set.make().deliver(OLD.delivery())
    assert data_set.read()["version"].unique().to_list() == [2]
    assert data_set.names() == ["results/batch=batch_1/results.parquet"]


def test_newer_results_that_arrive_meanwhile_stay(data_set: DataSet) -> None:
    old = OLD.delivery()

    def open_late() -> BinaryIO | None:
        data_set.make().deliver(NEW.delivery())
        return old.open_output()

    data_set.make().deliver(replace(old, open_output=open_late))
    assert data_set.marks()["results-version"] == "2"
    assert data_set.names() == ["results/batch=batch_1/results.parquet"]


def test_a_file_with_older_columns_is_written_again(data_set: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    data_set.make().deliver(OLD.delivery())
    monkeypatch.setattr(frames, "FORMAT", frames.FORMAT + 1)
    data_set.make().deliver(replace(OLD, attempt=2).delivery())
    assert data_set.marks()["results-format"] == str(frames.FORMAT)


def test_what_breaks_leaves_the_old_file_and_nothing_else(data_set: DataSet) -> None:
    data_set.make().deliver(OLD.delivery())
    before = data_set.read()
    many = replace(NEW, output=[answered(f"line-{number}") for number in range(9000)])
    with pytest.raises(Exception, match="cannot be read any further"):
        data_set.make().deliver(many.delivery(BreakingFile))
    assert data_set.read().equals(before)
    assert data_set.names() == ["results/batch=batch_1/results.parquet"]


def test_the_folder_is_a_data_set_while_a_file_is_being_written(tmp_path: Path) -> None:
    data_set = DataSet(str(tmp_path), None)
    data_set.make().deliver(OLD.delivery())
    late = three_kinds("batch_2").delivery()
    seen: list[list[str]] = []

    def look() -> BinaryIO | None:
        rows = polars.scan_parquet(tmp_path / "results", hive_partitioning=True)
        seen.append(rows.select("batch").unique().collect()["batch"].to_list())
        return late.open_output()

    data_set.make().deliver(replace(late, open_output=look))
    assert set(map(tuple, seen)) == {("batch_1",)}
    look()
    assert sorted(seen[-1]) == ["batch_1", "batch_2"]


def test_what_a_dead_process_left_goes_with_the_next_attempt(tmp_path: Path) -> None:
    data_set = DataSet(str(tmp_path), None)
    (tmp_path / ".partial").mkdir()
    for name in ("batch_1.77.1", "batch_10.77.1"):
        (tmp_path / ".partial" / name).write_bytes(b"half")
    data_set.make().deliver(OLD.delivery())
    assert data_set.names() == [".partial/batch_10.77.1", "results/batch=batch_1/results.parquet"]


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    data_set = DataSet(str(tmp_path), None)
    data_set.make().deliver(OLD.delivery())
    (tmp_path / "results/batch=batch_1/results.parquet").write_bytes(b"damage")
    data_set.make().deliver(OLD.delivery())
    assert len(data_set.read()) == 4


class TestUploads:
    @pytest.fixture
    def in_bucket(self, objects: ObjectServer) -> DataSet:
        return DataSet(objects.new_prefix(), objects)

    def test_an_error_of_the_server_is_told_as_it_is(self, in_bucket: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
        """polars stands between the write and us, and would call it a transport error."""

        def refuse(upload: Upload, data: bytes) -> int:
            upload.failure = DeliveryFailed("the bucket is full")
            raise upload.failure

        monkeypatch.setattr(Upload, "write", refuse)
        with pytest.raises(DeliveryFailed, match="the bucket is full"):
            in_bucket.make().deliver(OLD.delivery())

    def test_a_reply_that_was_lost_counts(self, in_bucket: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
        commit: Callable[[Upload], Written] = Upload.commit

        def twice(upload: Upload) -> Written:
            commit(upload)
            return commit(upload)

        monkeypatch.setattr(Upload, "commit", twice)
        in_bucket.make().deliver(OLD.delivery())
        assert len(in_bucket.read()) == 4


def test_check_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        DataSet(str(tmp_path / "file"), None).make().check()
    DataSet(str(tmp_path / "new"), None).make().check()


def test_it_is_off_without_a_destination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HANDLER_PARQUET_URL", raising=False)
    assert not ParquetHandler().enabled()
