"""The manifest of a batch: what its output was made of, with digests, so that everything can be checked again later.

Written by the merge for each pair of files it publishes, read by `vllm-batch verify`. On disk it is one JSON object
with the manifest and its own sha256; a manifest of which one byte was changed is refused.
"""

import hashlib

import msgspec

from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.provenance import Origin

FORMAT = 1
BLOCK_BYTES = 1 << 20


class FileDigest(msgspec.Struct, frozen=True):
    """A file as a whole, and where it matters the CRC-32 of each block of BLOCK_BYTES (8 hex digits each): they tell
    where in the file a damage is. `name` is a file id, or a path in the folder of the batch."""

    name: str
    bytes: int
    sha256: str
    lines: int | None = None
    blocks: str = ""


class JournalDigest(msgspec.Struct, frozen=True):
    """The journal of one attempt, as long as it was when the manifest was written."""

    epoch: int
    bytes: int
    sha256: str


class ChunkEntry(msgspec.Struct, frozen=True):
    """A published chunk. `answers` is the digest of its answers (stages/sealing.py); `origins` are positions in the
    manifest's list, for the attempts that have answered a line, None where an attempt left no note."""

    index: int
    model: str | None
    first_line: int
    lines: int
    epoch: int
    completed: int
    failed: int
    answers: str
    result: FileDigest
    journals: tuple[JournalDigest, ...]
    origins: tuple[int | None, ...]


class Counts(msgspec.Struct, frozen=True):
    total: int
    completed: int
    failed: int


class Manifest(msgspec.Struct, frozen=True):
    """See the module docstring. `chunk_lines` is the most lines that a chunk of the batch has."""

    format: int
    software: str
    batch: str
    endpoint: str
    created_at: int
    counts: Counts
    refused: int
    chunk_lines: int
    input: FileDigest | None
    output: FileDigest | None
    errors: FileDigest | None
    index: FileDigest
    chunks: tuple[ChunkEntry, ...]
    origins: tuple[Origin, ...]


class _Envelope(msgspec.Struct):
    manifest: msgspec.Raw
    sha256: str


def pack_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of the file."""
    return _seal(msgspec.json.format(msgspec.json.encode(manifest), indent=2))


def _seal(content: bytes) -> bytes:
    return b'{"manifest":%b,\n"sha256":"%b"}\n' % (content, hashlib.sha256(content).hexdigest().encode())


def unpack_manifest(packed: bytes) -> Manifest:
    """Raises StorageFailure when the bytes are not exactly those that were written."""
    try:
        envelope = msgspec.json.decode(packed, type=_Envelope)
        if _seal(bytes(envelope.manifest)) != packed:
            raise StorageFailure("the manifest fails its own digest")
        return msgspec.json.decode(envelope.manifest, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageFailure(f"the manifest cannot be read: {error}") from error
