"""The handler `parquet`: a data set of all results, with a partition for each batch and one file in it.

    <HANDLER_PARQUET_URL>/results/batch=<batch id>/results.parquet

Behind the merge on the data path. The file of a batch appears whole, and is replaced whole by that of newer results;
one of older results never takes its place. Locally it is renamed into the data set, on S3 a conditional upload does it.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

from handlers.base import Delivery, Handler
from handlers.buckets import Bucket, Condition, Conflict
from handlers.frames import is_current, marks, read_marks, upload_parquet, write_parquet
from handlers.settings import HandlerSettings

CONTENT_TYPE = "application/vnd.apache.parquet"


class Place(Protocol):
    """Where the data set is."""

    def check(self) -> None:
        """Raises when it cannot be written."""

    def store(self, delivery: Delivery) -> None:
        """Put the file of the batch there, unless these results or newer ones are there."""


class ParquetHandler(Handler):
    """See the module docstring. On when HANDLER_PARQUET_URL says where."""

    def __init__(self, settings: HandlerSettings | None = None) -> None:
        self._settings = settings or HandlerSettings()

    def name(self) -> str:
        return "parquet"

    def enabled(self) -> bool:
        return bool(self._settings.handler_parquet_url)

    def check(self) -> None:
        self._place.check()

    def deliver(self, delivery: Delivery) -> None:
        self._place.store(delivery)

    @cached_property
    def _place(self) -> Place:
        url = self._settings.handler_parquet_url
        if url.startswith("s3://"):
            return ObjectPlace(Bucket(url, self._settings.handler_s3_endpoint_url))
        return FolderPlace(Path(url).expanduser())


class FolderPlace:
    """A data set on a local disk. What is being written lies beside it, so that nobody reads half a file."""

    def __init__(self, folder: Path) -> None:
        self._data_set, self._workbench = folder / "results", folder / ".partial"

    def check(self) -> None:
        self._workbench.mkdir(parents=True, exist_ok=True)
        probe = self._workbench / f"probe.{os.getpid()}"
        probe.touch()
        probe.unlink()

    def store(self, delivery: Delivery) -> None:
        target = self._data_set / f"batch={delivery.batch.id}" / "results.parquet"
        if target.exists() and is_current(read_marks(target), delivery):
            return
        self._workbench.mkdir(parents=True, exist_ok=True)
        with self._partial(delivery) as partial:
            write_parquet(delivery, partial)
            _sync(partial)
            self._put(partial, target, delivery)

    def _put(self, partial: Path, target: Path, delivery: Delivery) -> None:
        """Rename the file into the data set. Nobody else does that between the look and the rename."""
        from filelock import FileLock

        with FileLock(self._workbench / "lock"):
            if target.exists() and is_current(read_marks(target), delivery):
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(target)
            for folder in (target.parent, self._data_set):
                _sync(folder)

    @contextmanager
    def _partial(self, delivery: Delivery) -> Iterator[Path]:
        """A name of this attempt alone. What dead attempts at the batch have left is removed first."""
        start = f"{delivery.batch.id}."
        for left in [path for path in self._workbench.iterdir() if path.name.startswith(start)]:
            left.unlink(missing_ok=True)
        partial = self._workbench / f"{start}{os.getpid()}.{threading.get_ident()}"
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)


class ObjectPlace:
    """A data set in a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def check(self) -> None:
        self._bucket.check()

    def store(self, delivery: Delivery) -> None:
        key = f"results/batch={delivery.batch.id}/results.parquet"
        found = self._bucket.find(key)
        if found is not None and is_current(found.metadata, delivery):
            return
        for left, upload_id in list(self._bucket.unfinished(key)):
            self._bucket.abort(left, upload_id)
        condition = Condition(found.etag if found is not None else None)
        with self._bucket.write(
            key,
            condition=condition,
            content_type=CONTENT_TYPE,
            metadata=marks(delivery),
            expected_bytes=_size(delivery),
        ) as upload:
            upload_parquet(delivery, upload)
            try:
                upload.commit()
            except Conflict:
                found = self._bucket.find(key)
                if found is None or not is_current(found.metadata, delivery):
                    raise


def _size(delivery: Delivery) -> int:
    """Return the bytes of both files: the Parquet file is hardly larger."""
    size = 0
    for file in (delivery.open_output(), delivery.open_errors()):
        if file is not None:
            with file:
                size += file.seek(0, os.SEEK_END)
    return size


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
