"""Contents of files and the working folder of a batch, on local disk. Called by the stages through their ports.

files/<file id>                                        contents, published whole
files/.tmp/<id>.<random>                               contents that are still arriving
files/.parts/<upload id>.<part id>                     a part of an upload; no file id has a dot
batches/<batch>/index.bin                              byte index of the input
batches/<batch>/journal/<chunk>/<epoch>.jsonl          answers of one attempt
batches/<batch>/results/<chunk>.<epoch>.idx            the published result of an attempt
batches/<batch>/suspects.json                          what is held against lines, while a run is at work
datasets/<name>/batch=<batch>/                         a data set, one folder per batch
"""

import hashlib
import os
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from vllm_batch_dagster.core.errors import InvalidInput, NotFound, StorageFailure
from vllm_batch_dagster.core.ports import StoredFile
from vllm_batch_dagster.stages.publication import Draft, make_folder, unwritable

PUSH_BYTES = 8 << 20
HASHERS = 4
_HASHED_APART = 256 << 10  # for less, handing over takes longer than hashing
_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")


class LocalFiles:
    """The file store in one folder, which is created when the first file comes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hashers = ThreadPoolExecutor(HASHERS, "hash")  # starts no thread before it is used

    @property
    def parts(self) -> "LocalParts":
        return LocalParts(self._folder, self._hashers)

    def create(self, file_id: str) -> StoredFile:
        """Raises InvalidInput for an id that is no file name, StorageFailure when the disk refuses."""
        return _begin_file(self._folder / check_id(file_id), self._folder, self._hashers)

    def open(self, file_id: str) -> BinaryIO:
        """Raises NotFound, and StorageFailure when the file is there but cannot be read."""
        if not _ID.fullmatch(file_id):
            raise NotFound("file", file_id)
        return _open_file(self._folder / file_id, NotFound("file", file_id))

    def delete(self, file_id: str) -> None:
        """Harmless when absent. Raises StorageFailure when the file cannot be removed."""
        if _ID.fullmatch(file_id):
            _remove_file(self._folder / file_id)

    def sweep(self) -> int:
        """Remove what killed processes left half written, and return how many files. Nobody may be writing."""
        drafts = list((self._folder / ".tmp").glob("*"))
        for draft in drafts:
            draft.unlink(missing_ok=True)
        return len(drafts)


class LocalParts:
    """The parts of uploads, in a folder below the files. It stays when they go, so that none arrives nowhere."""

    def __init__(self, folder: Path, hashers: ThreadPoolExecutor) -> None:
        self._files, self._folder, self._hashers = folder, folder / ".parts", hashers

    def create(self, upload_id: str, part_id: str) -> StoredFile:
        """Raises InvalidInput for an id that is no file name, StorageFailure when the disk refuses."""
        name = f"{check_id(upload_id)}.{check_id(part_id)}"
        return _begin_file(make_folder(self._folder) / name, self._files, self._hashers)

    def open(self, upload_id: str, part_id: str) -> BinaryIO:
        """Raises NotFound, and StorageFailure when the part is there but cannot be read."""
        if not (_ID.fullmatch(upload_id) and _ID.fullmatch(part_id)):
            raise NotFound("part", part_id)
        return _open_file(self._folder / f"{upload_id}.{part_id}", NotFound("part", part_id))

    def delete(self, upload_id: str) -> None:
        """Harmless when there are none. Raises StorageFailure when one cannot be removed."""
        if _ID.fullmatch(upload_id):
            for path in self._folder.glob(f"{upload_id}.*"):
                _remove_file(path)


def _begin_file(target: Path, files: Path, hashers: ThreadPoolExecutor) -> "_ArrivingFile":
    drafts = make_folder(files / ".tmp")
    return _ArrivingFile(target, drafts / f"{target.name}.{secrets.token_hex(8)}", hashers)


def _open_file(path: Path, missing: NotFound) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise missing from None
    except OSError as error:
        raise StorageFailure(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def _remove_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailure(f"{path} cannot be removed: {error.strerror}.") from error


class _ArrivingFile:
    """Contents on their way to the disk. A large block is hashed and written at the same time."""

    def __init__(self, target: Path, temporary: Path, hashers: ThreadPoolExecutor) -> None:
        self._target, self._hashers = target, hashers
        self._draft = Draft(target, temporary)
        self._hash = hashlib.sha256()
        self._size = 0
        self._pushed = 0

    def write(self, data: bytes | bytearray) -> None:
        """Raises StorageFailure; the file can then only be discarded. `data` is the caller's again afterwards."""
        if len(data) < _HASHED_APART:
            self._write(data)
            self._hash.update(data)
        else:
            hashing = self._hashers.submit(self._hash.update, data)
            try:
                self._write(data)
            finally:
                hashing.result()
        self._size += len(data)
        if self._size - self._pushed >= PUSH_BYTES:
            self._push()

    def commit(self) -> tuple[int, str]:
        """Return (bytes, sha256 hex). Raises StorageFailure."""
        self._draft.commit()
        return self._size, self._hash.hexdigest()

    def discard(self) -> None:
        self._draft.discard()

    def _write(self, data: bytes | bytearray) -> None:
        try:
            self._draft.file.write(data)
        except OSError as error:
            self._draft.discard()
            raise unwritable(self._target, error) from error

    def _push(self) -> None:
        """Let the disk begin with what came by now, so that `commit` has little left to wait for."""
        if hasattr(os, "posix_fadvise"):  # Linux: "not needed" writes what is dirty, and drops only what is clean
            length = self._size - self._pushed
            os.posix_fadvise(self._draft.file.fileno(), self._pushed, length, os.POSIX_FADV_DONTNEED)
        self._pushed = self._size


class LocalWorkspace:
    """The working folders. Every `*_path` creates the folders above the path, never the path itself.

    All of them raise InvalidInput for an id that is no file name, StorageFailure when the disk refuses.
    """

    def __init__(self, batches_folder: Path, datasets_folder: Path) -> None:
        self._batches, self._datasets = batches_folder, datasets_folder

    def index_path(self, batch_id: str) -> Path:
        return make_folder(self._batches / check_id(batch_id)) / "index.bin"

    def journal_path(self, batch_id: str, chunk: int, epoch: int) -> Path:
        folder = self._batches / check_id(batch_id) / "journal" / f"{chunk:04d}"
        return make_folder(folder) / f"{epoch:06d}.jsonl"

    def result_path(self, batch_id: str, chunk: int, epoch: int) -> Path:
        folder = self._batches / check_id(batch_id) / "results"
        return make_folder(folder) / f"{chunk:04d}.{epoch:06d}.idx"

    def suspects_path(self, batch_id: str) -> Path:
        return make_folder(self._batches / check_id(batch_id)) / "suspects.json"

    def dataset_path(self, name: str, batch_id: str) -> Path:
        return make_folder(self._datasets / check_id(name)) / f"batch={check_id(batch_id)}"


def check_id(text: str) -> str:
    """Return `text` if it can be a file name that stays in its folder. Raises InvalidInput."""
    if not _ID.fullmatch(text):
        raise InvalidInput(f"{text[:100]!r} is not an id: only letters, digits, '_' and '-' are allowed, at most 200.")
    return text
