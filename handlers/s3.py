"""The handler `s3`: the files of a batch as objects, and a manifest that names them, written last.

Behind the merge on the data path. Under the prefix of HANDLER_S3_URL:

    <batch id>/manifest.json                 which version stands, and its files with sizes and digests
    <batch id>/v<version>/output.jsonl       answered lines, as in the API's output file
    <batch id>/v<version>/errors.jsonl       the others
    <batch id>/v<version>/results.parquet    all of them as a table, if HANDLER_S3_PARQUET

The manifest is replaced by a conditional put and never by one of an older version; what it names was there before. A
delivery that comes again finds its own manifest and is done.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from typing import BinaryIO

import msgspec

from handlers.base import Delivery, DeliveryFailed, Handler
from handlers.buckets import Bucket, Condition, Conflict, Written
from handlers.frames import upload_parquet
from handlers.settings import HandlerSettings

FORMAT = 1
BLOCK_BYTES = 1 << 20
PUBLISH_TRIES = 3
_OF_VERSION = re.compile(r"v(\d+)/")
_JSONL, _JSON, _PARQUET = "application/x-ndjson", "application/json", "application/vnd.apache.parquet"


class Entry(msgspec.Struct, frozen=True):
    """A file in a manifest. `key` counts from the prefix of HANDLER_S3_URL; `lines` is None for a Parquet file."""

    name: str
    key: str
    bytes: int
    sha256: str
    etag: str
    lines: int | None = None


class Manifest(msgspec.Struct, frozen=True):
    """What stands for a batch. `delivery_key` is the idempotency key of the delivery that wrote it."""

    format: int
    batch_id: str
    version: int
    delivery_key: str
    project_id: str
    endpoint: str
    model: str | None
    status: str
    metadata: dict[str, str]
    request_counts: dict[str, int]
    usage: dict[str, int] | None
    created_at: int
    ended_at: int | None
    files: list[Entry]


_decode_manifest = msgspec.json.Decoder(Manifest).decode


class S3Handler(Handler):
    """See the module docstring. On when HANDLER_S3_URL says where."""

    def __init__(self, settings: HandlerSettings | None = None) -> None:
        self._settings = settings or HandlerSettings()

    def name(self) -> str:
        return "s3"

    def enabled(self) -> bool:
        return bool(self._settings.handler_s3_url)

    def check(self) -> None:
        self._bucket.check()

    def deliver(self, delivery: Delivery) -> None:
        shelf = _Shelf(self._bucket, delivery)
        standing, condition = shelf.read_manifest()
        if not shelf.is_done(standing):
            shelf.drop_unfinished()
            shelf.publish(list(shelf.upload(self._settings.handler_s3_parquet)), condition)
        shelf.sweep()

    @cached_property
    def _bucket(self) -> Bucket:
        return Bucket(self._settings.handler_s3_url, self._settings.handler_s3_endpoint_url)


class _Shelf:
    """The objects of one batch, for one delivery."""

    def __init__(self, bucket: Bucket, delivery: Delivery) -> None:
        self._bucket, self._delivery = bucket, delivery
        self._folder = f"{delivery.batch.id}/"
        self._manifest_key = f"{self._folder}manifest.json"

    def read_manifest(self) -> tuple[Manifest | None, Condition]:
        """Return the manifest that stands, and the condition under which ours may take its place."""
        found = self._bucket.read(self._manifest_key)
        if found is None:
            return None, Condition(None)
        content, etag = found
        try:
            return _decode_manifest(content), Condition(etag)
        except msgspec.DecodeError:  # not ours, or damaged: ours takes its place
            return None, Condition(etag)

    def is_done(self, standing: Manifest | None) -> bool:
        """True when newer results stand, or these, and nobody has taken a file of them away."""
        if standing is None or standing.version < self._delivery.version:
            return False
        return standing.version > self._delivery.version or all(map(self._is_there, standing.files))

    def upload(self, with_parquet: bool) -> Iterator[Entry]:
        size = 0
        for name, opener in (
            ("output.jsonl", self._delivery.open_output),
            ("errors.jsonl", self._delivery.open_errors),
        ):
            if (file := opener()) is not None:
                with file:
                    entry = self._upload_file(name, file)
                size += entry.bytes
                yield entry
        if with_parquet:
            yield self._upload_parquet(size)

    def publish(self, files: list[Entry], condition: Condition) -> None:
        """Put the manifest. Raises DeliveryFailed when others write it again and again."""
        manifest = msgspec.json.format(msgspec.json.encode(_describe(self._delivery, files)), indent=2)
        for _ in range(PUBLISH_TRIES):
            try:
                with self._bucket.write(self._manifest_key, condition=condition, content_type=_JSON) as upload:
                    upload.write(manifest)
                    upload.commit()
                return
            except Conflict:
                standing, condition = self.read_manifest()
                if self.is_done(standing):
                    return
        raise DeliveryFailed(f"the manifest of {self._delivery.batch.id} is changed by somebody else all the time")

    def drop_unfinished(self) -> None:
        """Take away the parts that attempts left behind whose process died. What is newer is not ours to touch."""
        for key, upload_id in list(self._bucket.unfinished(self._folder)):
            if self._version(key) <= self._delivery.version:
                self._bucket.abort(key, upload_id)

    def sweep(self) -> None:
        """Delete the objects of every version older than the one that stands."""
        standing, _ = self.read_manifest()
        newest = standing.version if standing is not None else 0
        self._bucket.delete([key for key in self._bucket.keys(f"{self._folder}v") if self._version(key) < newest])

    def _is_there(self, entry: Entry) -> bool:
        found = self._bucket.find(entry.key)
        return found is not None and (found.bytes, found.etag) == (entry.bytes, entry.etag)

    def _version(self, key: str) -> int:
        """Return the version to which an object belongs; that of what is not ours is larger than any."""
        found = _OF_VERSION.match(key.removeprefix(self._folder))
        return int(found[1]) if found else 1 << 62

    def _key(self, name: str) -> str:
        return f"{self._folder}v{self._delivery.version}/{name}"

    def _upload_file(self, name: str, file: BinaryIO) -> Entry:
        file.seek(0, 2)
        size = file.tell()
        file.seek(0)
        with self._bucket.write(self._key(name), expected_bytes=size, content_type=_JSONL) as upload:
            while block := file.read(BLOCK_BYTES):
                upload.write(block)
            written = upload.commit()
        return self._entry(name, written, lines=written.lines)

    def _upload_parquet(self, expected_bytes: int) -> Entry:
        name = "results.parquet"
        with self._bucket.write(self._key(name), expected_bytes=expected_bytes, content_type=_PARQUET) as upload:
            upload_parquet(self._delivery, upload)
            return self._entry(name, upload.commit())

    def _entry(self, name: str, written: Written, lines: int | None = None) -> Entry:
        return Entry(name, self._key(name), written.bytes, written.sha256, written.etag, lines)


def _describe(delivery: Delivery, files: list[Entry]) -> Manifest:
    batch = delivery.batch
    return Manifest(
        format=FORMAT,
        batch_id=batch.id,
        version=delivery.version,
        delivery_key=delivery.key,
        project_id=batch.project_id,
        endpoint=batch.endpoint,
        model=batch.model,
        status=batch.status.value,
        metadata=dict(batch.metadata or {}),
        request_counts=asdict(batch.counts),
        usage=asdict(batch.usage) if batch.usage is not None else None,
        created_at=batch.created_at,
        ended_at=batch.completed_at or batch.expired_at or batch.cancelled_at,
        files=files,
    )
