"""One upload on the in-memory store and local files, and a process that dies at a chosen call."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_batch_dagster.adapters.local_files import LocalFiles
from vllm_batch_dagster.adapters.memory import FixedClock, MemoryStore
from vllm_batch_dagster.core.models import File
from vllm_batch_dagster.core.uploads import Completion, Upload, UploadPart
from vllm_batch_dagster.stages.uploads import PartReceipt, UploadPorts, complete_upload, create_upload, find_upload


class Killed(BaseException):
    """The process ends here: nothing behind it runs, but in a test the `finally` blocks do."""


class Desk:
    """The steps of one upload of `content`, with everything filled in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.store = folder, FixedClock(), MemoryStore()
        self.files = LocalFiles(folder)
        numbers = itertools.count(1)
        self.ports = UploadPorts(self.store, self.files, self.clock, lambda size: next(numbers).to_bytes(size, "big"))

    def begin(self, size: int = 6) -> Upload:
        params = {"filename": "in.jsonl", "purpose": "batch", "bytes": size, "mime_type": "text/plain"}
        return create_upload(params, self.ports)

    def add(self, upload: Upload, data: bytes) -> UploadPart:
        receipt = PartReceipt(upload, self.ports)
        receipt.write(data)
        return receipt.finish()

    def fill(self) -> tuple[Upload, Completion]:
        """Return a pending upload with all its parts, and the completion that makes them `abcdef`."""
        upload = self.begin()
        last, first = self.add(upload, b"def"), self.add(upload, b"abc")
        return upload, Completion((first.id, last.id))

    def complete(self, upload: Upload, wanted: Completion, go_on: Callable[[], None] = lambda: None) -> File:
        return complete_upload(find_upload(upload.id, self.ports), wanted, self.ports, go_on=go_on)[1]

    def status(self, upload: Upload) -> str:
        return self.store.uploads.get(upload.id).status.value

    def read(self, file: File) -> bytes:
        with self.files.open(file.id) as reader:
            return reader.read()

    @property
    def stored(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *, after: bool = False) -> None:
    """Let the process die at the next call of `owner.name`, before it or behind it."""
    call = getattr(owner, name)

    def die(*args: object, **options: object) -> None:
        monkeypatch.setattr(owner, name, call)
        if after:
            call(*args, **options)
        raise Killed

    monkeypatch.setattr(owner, name, die)


def no_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process removes nothing."""
    monkeypatch.setattr("vllm_batch_dagster.stages.uploads.discard_unregistered", lambda *_: None)
