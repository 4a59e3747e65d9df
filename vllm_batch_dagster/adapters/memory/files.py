"""Contents of files in memory."""

import hashlib
from io import BytesIO
from typing import BinaryIO

from vllm_batch_dagster.adapters.local_files import check_id
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.ports import StoredFile


class MemoryFiles:
    """See FileStore."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}
        self._parts = MemoryParts()

    @property
    def parts(self) -> "MemoryParts":
        return self._parts

    def create(self, file_id: str) -> StoredFile:
        """Raises InvalidInput for an id that no file system would take."""
        return _ArrivingBytes(self._contents, check_id(file_id))

    def open(self, file_id: str) -> BinaryIO:
        try:
            return BytesIO(self._contents[file_id])
        except KeyError:
            raise NotFound("file", file_id) from None

    def delete(self, file_id: str) -> None:
        self._contents.pop(file_id, None)


class MemoryParts:
    """See PartStore."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    def create(self, upload_id: str, part_id: str) -> StoredFile:
        """Raises InvalidInput for an id that no file system would take."""
        return _ArrivingBytes(self._contents, f"{check_id(upload_id)}.{check_id(part_id)}")

    def open(self, upload_id: str, part_id: str) -> BinaryIO:
        try:
            return BytesIO(self._contents[f"{upload_id}.{part_id}"])
        except KeyError:
            raise NotFound("part", part_id) from None

    def delete(self, upload_id: str) -> None:
        for name in [name for name in self._contents if name.startswith(f"{upload_id}.")]:
            del self._contents[name]


class _ArrivingBytes:
    def __init__(self, contents: dict[str, bytes], file_id: str) -> None:
        self._contents, self._id = contents, file_id
        self._buffer = BytesIO()

    def write(self, data: bytes | bytearray) -> None:
        self._buffer.write(data)

    def commit(self) -> tuple[int, str]:
        whole = self._buffer.getvalue()
        self._contents[self._id] = whole
        return len(whole), hashlib.sha256(whole).hexdigest()

    def discard(self) -> None:
        self._buffer = BytesIO()
