"""The handler `s3` on a real server: what the manifest says, whose results stay, parts that are left, and errors."""

import hashlib
import json
import logging
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import polars
import pytest

from handlers.base import DeliveryFailed
from handlers.buckets import PART_BYTES, Bucket, Condition, Conflict, Upload, Written
from handlers.s3 import S3Handler
from handlers.settings import HandlerSettings
from handlers.testing import BreakingFile, Case, Interrupted, answered, three_kinds
from tests.contract.object_server import (
    BUCKET,
    SECRET_KEY,
    ObjectServer,
    list_keys,
    list_unfinished,
    make_client,
    read_object,
)
from vllm_batch_dagster.core.errors import ConfigurationError

OLD = three_kinds("batch_1")
NEW = replace(OLD, output=[*OLD.output, answered("c")], errors=(), version=2)


class Shelf:
    """A handler with a prefix of its own."""

    def __init__(self, objects: ObjectServer) -> None:
        self.objects, self.url = objects, objects.new_prefix()

    def make(self, **changes: Any) -> S3Handler:
        settings = {"handler_s3_url": self.url, "handler_s3_endpoint_url": self.objects.endpoint_url, **changes}
        return S3Handler(HandlerSettings(**settings))

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.url, self.objects.endpoint_url)

    def keys(self) -> list[str]:
        return list_keys(self.objects, self.url)

    def read(self, key: str) -> bytes:
        return read_object(self.objects, self.url, key)

    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(self.read("batch_1/manifest.json"))
        return manifest

    def changed_at(self) -> dict[str, object]:
        """Return when each object was last written, and its etag."""
        prefix = self.url.removeprefix(f"s3://{BUCKET}/") + "/"
        found = make_client(self.objects).list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
        return {each["Key"]: (each["LastModified"], each["ETag"]) for each in found}


@pytest.fixture
def shelf(objects: ObjectServer) -> Shelf:
    return Shelf(objects)


def test_the_manifest_names_every_file_with_its_size_and_digest(shelf: Shelf) -> None:
    delivery = OLD.delivery()
    shelf.make(handler_s3_parquet=True).deliver(delivery)
    manifest = shelf.manifest()
    assert (manifest["version"], manifest["delivery_key"], manifest["status"]) == (1, delivery.key, "completed")
    assert (manifest["metadata"], manifest["model"]) == ({"team": "sëarch"}, "tiny")
    assert manifest["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    assert {entry["name"]: entry["lines"] for entry in manifest["files"]} == {
        "output.jsonl": 2,
        "errors.jsonl": 2,
        "results.parquet": None,
    }
    for entry in manifest["files"]:
        content = shelf.read(entry["key"])
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert shelf.read("batch_1/v1/output.jsonl") == b"".join(delivery.output.lines())
    (parquet,) = [entry["key"] for entry in manifest["files"] if entry["key"].endswith(".parquet")]
    assert polars.read_parquet(shelf.read(parquet))["custom_id"].to_list() == ["a", "b", "c", "d"]


def test_a_delivery_that_comes_again_writes_nothing(shelf: Shelf) -> None:
    shelf.make().deliver(OLD.delivery())
    before = shelf.changed_at()
    shelf.make().deliver(replace(OLD, attempt=2).delivery())
    assert shelf.changed_at() == before


def test_a_file_that_somebody_took_away_is_written_again(shelf: Shelf) -> None:
    shelf.make().deliver(OLD.delivery())
    shelf.bucket.delete(["batch_1/v1/errors.jsonl"])
    shelf.make().deliver(OLD.delivery())
    assert shelf.keys() == ["batch_1/manifest.json", "batch_1/v1/errors.jsonl", "batch_1/v1/output.jsonl"]


def test_a_manifest_that_is_not_ours_is_replaced(shelf: Shelf) -> None:
    with shelf.bucket.write("batch_1/manifest.json") as upload:
        upload.write(b"no JSON")
        upload.commit()
    shelf.make().deliver(OLD.delivery())
    assert shelf.manifest()["version"] == 1


def test_older_results_never_take_the_place_of_newer_ones(shelf: Shelf) -> None:
    shelf.make().deliver(NEW.delivery())
    before = shelf.changed_at()
    shelf.make().deliver(OLD.delivery())
    assert shelf.changed_at() == before


def test_newer_results_that_arrive_meanwhile_stay(shelf: Shelf) -> None:
    """The older attempt had looked before them: the condition of its last step does not hold."""
    old = OLD.delivery()

    def open_late() -> BinaryIO | None:
        shelf.make().deliver(NEW.delivery())
        return old.open_output()

    shelf.make().deliver(replace(old, open_output=open_late))
    assert shelf.manifest()["version"] == 2
    assert shelf.keys() == ["batch_1/manifest.json", "batch_1/v2/output.jsonl"]


def test_a_manifest_whose_reply_was_lost_counts(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library sends the request again, and our own object breaks the condition."""
    commit = Upload.commit

    def lose(upload: Upload) -> Written:
        written = commit(upload)
        if upload._key.endswith("manifest.json"):
            raise Conflict("sent twice")
        return written

    monkeypatch.setattr(Upload, "commit", lose)
    shelf.make().deliver(OLD.delivery())
    assert shelf.manifest()["version"] == 1


def test_a_manifest_that_others_change_all_the_time_is_a_failure(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(upload: Upload) -> Written:
        raise Conflict("not now")

    handler = shelf.make()
    monkeypatch.setattr(Upload, "commit", refuse)
    monkeypatch.setattr("handlers.s3._Shelf._upload_file", lambda *_: pytest.fail("not reached"))
    case = replace(OLD, output=(), errors=())
    with pytest.raises(DeliveryFailed, match="changed by somebody else all the time"):
        handler.deliver(case.delivery())


class TestLargeFiles:
    CASE = Case([answered(f"line-{number}", "word " * 1000) for number in range(4000)], batch_id="batch_1")

    def test_they_go_up_in_parts(self, shelf: Shelf) -> None:
        delivery = self.CASE.delivery()
        shelf.make().deliver(delivery)
        (entry,) = shelf.manifest()["files"]
        content = b"".join(delivery.output.lines())
        assert entry["bytes"] == len(content) > 2 * PART_BYTES
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["etag"].strip('"').endswith("-3")
        assert shelf.read(entry["key"]) == content

    @pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, SystemExit])
    def test_what_breaks_leaves_no_part(self, shelf: Shelf, error: type[BaseException]) -> None:
        class Broken(BreakingFile):
            def read(self, size: int | None = -1, /) -> bytes:
                if self.tell() > PART_BYTES * 1.2:
                    raise error
                return super().read(size)

        with pytest.raises(error):
            shelf.make().deliver(self.CASE.delivery(Broken))
        assert list_unfinished(shelf.objects, shelf.url) == []
        assert shelf.keys() == []

    def test_only_parts_of_older_or_the_same_results_are_taken_away(self, shelf: Shelf) -> None:
        client = make_client(shelf.objects)
        for version in (1, 2, 3):
            client.create_multipart_upload(**shelf.bucket.address(f"batch_1/v{version}/output.jsonl"))
        shelf.make().deliver(NEW.delivery())
        assert list_unfinished(shelf.objects, shelf.url) == ["batch_1/v3/output.jsonl"]

    def test_a_known_size_makes_larger_parts_than_their_number_allows(self, shelf: Shelf) -> None:
        upload = shelf.bucket.write("x", expected_bytes=200 << 30)
        assert (200 << 30) / upload._part_bytes <= 10_000


class TestErrors:
    def told(self, call: Callable[[], object]) -> str:
        with pytest.raises(DeliveryFailed) as caught:
            call()
        return "".join(traceback.format_exception(caught.value))

    def test_wrong_credentials(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY + "x")
        for call in (shelf.make().check, lambda: shelf.make().deliver(OLD.delivery())):
            told = self.told(call)
            assert "SignatureDoesNotMatch" in told or "403" in told
            assert SECRET_KEY not in told + caplog.text

    def test_no_credentials_no_bucket_and_no_server(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "NoSuchBucket" in self.told(shelf.make(handler_s3_url="s3://missing-bucket/x").check)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        assert "credentials" in self.told(shelf.make().check)

    @pytest.mark.parametrize("url", ["bucket/prefix", "https://bucket/prefix", "s3://", "s3:///x"])
    def test_a_url_that_is_none(self, shelf: Shelf, url: str) -> None:
        with pytest.raises(ConfigurationError, match="is not s3://bucket/prefix"):
            shelf.make(handler_s3_url=url).check()


def test_a_condition_holds_off_others(shelf: Shelf) -> None:
    def put(content: bytes, condition: Condition) -> Written:
        with shelf.bucket.write("x", condition=condition) as upload:
            upload.write(content)
            return upload.commit()

    first = put(b"1", Condition(None))
    with pytest.raises(Conflict):
        put(b"2", Condition(None))
    put(b"3", Condition(first.etag))
    with pytest.raises(Conflict):
        put(b"4" * PART_BYTES + b"4", Condition(first.etag))
    assert shelf.read("x") == b"3"
    assert list_unfinished(shelf.objects, shelf.url) == []


def test_it_is_off_without_a_destination(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HANDLER_S3_URL", raising=False)
    assert not S3Handler().enabled()
    (tmp_path / ".env").write_text("HANDLER_S3_URL=s3://bucket/prefix\n")
    assert S3Handler().enabled()
