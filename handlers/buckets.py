"""Objects in S3 or in a server that speaks its language. Used by the handlers `s3` and `parquet`.

An object is written as it comes, a part at a time, and appears when it is committed, whole; a writer that is left by an
exception takes its parts away. A condition at the commit (only if nothing is there; only in place of that one) keeps
two writers from overwriting each other. Everything that the server or the library refuses is a DeliveryFailed.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from handlers.base import DeliveryFailed
from vllm_batch_dagster.core.errors import ConfigurationError

PART_BYTES = 8 << 20
MOST_PARTS = 10_000  # of one object, and all but the last of one size: some servers ask for that
CONNECT_SECONDS, READ_SECONDS, TRIES = 10, 60, 5
DEFAULT_REGION = "us-east-1"
_URL = re.compile(r"s3://(?P<bucket>[^/\s]+)(?:/(?P<prefix>.*))?")
_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchUpload", "412", "409")
_MISSING = ("NoSuchKey", "NotFound", "404")


class Conflict(DeliveryFailed):
    """The object is not what the condition of a commit says: somebody else wrote it. Or we did, and the reply was lost
    before the library sent the request again: who gets this looks whose object stands there."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object that is there. `etag` as the server gives it; `metadata` what its writer noted with it."""

    etag: str
    bytes: int
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Condition:
    """Commit only in place of the object with this `etag`; None: only when there is none."""

    etag: str | None

    def as_arguments(self) -> dict[str, str]:
        return {"IfNoneMatch": "*"} if self.etag is None else {"IfMatch": self.etag}


@dataclass(frozen=True, slots=True)
class Written:
    """What a committed object is. `sha256` is the hex digest of its content."""

    etag: str
    bytes: int
    lines: int
    sha256: str


class Bucket:
    """A bucket and a prefix, as `s3://bucket/prefix`. Keys are relative to the prefix. Not for two threads at once."""

    def __init__(self, url: str, endpoint_url: str = "") -> None:
        """Raises ConfigurationError."""
        found = _URL.fullmatch(url)
        if found is None:
            raise ConfigurationError(f"{url!r} is not s3://bucket/prefix")
        self.name, prefix = found["bucket"], (found["prefix"] or "").strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._endpoint_url = endpoint_url or None

    def address(self, key: str) -> dict[str, str]:
        """Return the arguments that name an object."""
        return {"Bucket": self.name, "Key": self._prefix + key}

    def find(self, key: str) -> Stored | None:
        with told("look at an object"):
            try:
                head = self.client.head_object(**self.address(key))
            except self.client.exceptions.ClientError as error:
                if _code(error) in _MISSING:
                    return None
                raise
        return Stored(head["ETag"], head["ContentLength"], head["Metadata"])

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Return the content of a small object and its etag."""
        with told("read an object"):
            try:
                got = self.client.get_object(**self.address(key))
            except self.client.exceptions.NoSuchKey:
                return None
            return got["Body"].read(), got["ETag"]

    def write(
        self,
        key: str,
        *,
        condition: Condition | None = None,
        expected_bytes: int = 0,
        content_type: str = "application/octet-stream",
        metadata: Mapping[str, str] | None = None,
    ) -> "Upload":
        """Return a writer of the object. `expected_bytes` lets a large one have larger parts."""
        settings = {"ContentType": content_type, "Metadata": dict(metadata or {})}
        part_bytes = max(PART_BYTES, -(-expected_bytes // (MOST_PARTS - 1)))
        return Upload(self, key, condition, settings, part_bytes)

    def keys(self, prefix: str) -> Iterator[str]:
        with told("list objects"):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.name, Prefix=self._prefix + prefix):
                for found in page.get("Contents", ()):
                    yield found["Key"].removeprefix(self._prefix)

    def delete(self, keys: Collection[str]) -> None:
        """Delete objects. One that is not there is no error."""
        with told("delete an object"):
            for key in keys:
                self.client.delete_object(**self.address(key))

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield (key, upload id) of uploads that were begun and not committed: their writers died, or are at it."""
        with told("list unfinished uploads"):
            pages = self.client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.name, Prefix=self._prefix + prefix):
                for found in page.get("Uploads", ()):
                    yield found["Key"].removeprefix(self._prefix), found["UploadId"]

    def abort(self, key: str, upload_id: str) -> None:
        """Take the parts of an upload away. One that is not there is no error."""
        with told("abort an upload"), suppress(self.client.exceptions.NoSuchUpload):
            self.client.abort_multipart_upload(**self.address(key), UploadId=upload_id)

    def check(self) -> None:
        """Raises DeliveryFailed when the bucket cannot be reached."""
        with told("list objects"):
            self.client.list_objects_v2(Bucket=self.name, Prefix=self._prefix, MaxKeys=1)

    @cached_property
    def client(self) -> Any:
        """boto3's client, made at the first use: its import takes a third of a second and 30 MB."""
        from boto3.session import Session
        from botocore.config import Config

        options: dict[str, Any] = {}
        if self._endpoint_url:  # path style and no checksums beyond the usual: what S3-compatible servers all know
            options = {"s3": {"addressing_style": "path"}, "request_checksum_calculation": "when_required"}
        with told("begin"):
            session = Session()
            return session.client(
                "s3",
                endpoint_url=self._endpoint_url,
                region_name=session.region_name or DEFAULT_REGION,
                config=Config(
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=READ_SECONDS,
                    retries={"mode": "standard", "total_max_attempts": TRIES},
                    **options,
                ),
            )


class Upload:
    """Writes one object. To be used in a `with`: without a commit in it, nothing is there afterwards.

    Holds one part. An object that fits into one is put in a single request.
    """

    def __init__(
        self, bucket: Bucket, key: str, condition: Condition | None, settings: Mapping[str, Any], part_bytes: int
    ) -> None:
        self._bucket, self._address, self._key = bucket, bucket.address(key), key
        self._condition = condition.as_arguments() if condition is not None else {}
        self._settings, self._part_bytes = settings, part_bytes
        self._upload_id: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._buffer = bytearray()
        self._digest, self._bytes, self._lines = hashlib.sha256(), 0, 0
        self.failure: DeliveryFailed | None = None
        """What the last write raised, for a caller between whom and us a library makes an error of its own of it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._upload_id is not None:
            with suppress(DeliveryFailed):  # the first error counts; the next attempt finds what is left
                self._bucket.abort(self._key, self._upload_id)

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._bytes, self._lines = self._bytes + len(data), self._lines + data.count(b"\n")
        rest = memoryview(data)
        while rest:
            taken = rest[: self._part_bytes - len(self._buffer)]
            self._buffer += taken
            rest = rest[len(taken) :]
            if len(self._buffer) == self._part_bytes:
                self._send()
        return len(data)

    def commit(self) -> Written:
        """Make the object appear. Raises Conflict when the condition does not hold, DeliveryFailed."""
        with told("write an object"):
            if self._upload_id is None:
                done = self._client.put_object(
                    **self._address, Body=bytes(self._buffer), **self._settings, **self._condition
                )
            else:
                if self._buffer:
                    self._send()
                done = self._client.complete_multipart_upload(
                    **self._address,
                    UploadId=self._upload_id,
                    MultipartUpload={"Parts": self._parts},
                    **self._condition,
                )
        self._upload_id = None
        return Written(done["ETag"], self._bytes, self._lines, self._digest.hexdigest())

    @property
    def _client(self) -> Any:
        return self._bucket.client

    def _send(self) -> None:
        """Upload the buffer as the next part."""
        part, self._buffer = self._buffer, bytearray()
        number = len(self._parts) + 1
        try:
            with told("write a part"):
                if self._upload_id is None:
                    begun = self._client.create_multipart_upload(**self._address, **self._settings)
                    self._upload_id = begun["UploadId"]
                sent = self._client.upload_part(**self._address, UploadId=self._upload_id, PartNumber=number, Body=part)
        except DeliveryFailed as failure:
            self.failure = failure
            raise
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})


@contextmanager
def told(action: str) -> Iterator[None]:
    """Turn errors of the library into ours, without what they quote beside code and message."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        if _code(error) in _CONFLICTS:
            raise Conflict(f"S3 does not let us {action}: somebody else changed it") from None
        message = error.response.get("Error", {}).get("Message", "")
        raise DeliveryFailed(f"S3 does not let us {action}: {_code(error)} {message}".rstrip()) from None
    except BotoCoreError as error:
        raise DeliveryFailed(f"S3 does not let us {action}: {error}") from None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
