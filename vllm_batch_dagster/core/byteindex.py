"""The byte index of an input file: where each request line lies. Written once by validation, read by chunks and merge.

    header  magic (8 bytes) | lines (u64)
    entry   offset (u64) | length (u32) | hash of custom_id (u64) | estimated tokens (u32)

Little-endian, 24 bytes an entry: a million lines take 24 MB on disk, and a chunk seeks to its own part. Entries are in
input order; those of a file with several models (lenient mode) are grouped by model, in input order within a group,
and what lenient mode refused stands behind the entries (core/rejections.py).
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from vllm_batch_dagster.core.errors import StorageFailure

MAGIC = b"VBINDEX1"
_HEADER = struct.Struct("<8sQ")
_ENTRY = struct.Struct("<QIQI")
_BYTES_PER_TOKEN = 4  # a rule of thumb for English; only for planning


class IndexEntry(NamedTuple):
    """`offset` and `length` in bytes within the input file, without the line's newline."""

    offset: int
    length: int
    id_hash: int
    tokens: int


def pack_header(lines: int) -> bytes:
    return _HEADER.pack(MAGIC, lines)


def pack_entry(entry: IndexEntry) -> bytes:
    return _ENTRY.pack(*entry)


def estimate_tokens(body: bytes) -> int:
    """Return a rough count of the tokens in a request body."""
    return min(len(body) // _BYTES_PER_TOKEN, 0xFFFFFFFF)


def read_count(index: BinaryIO) -> int:
    """Return the number of lines. Raises StorageFailure when `index` is not a byte index."""
    index.seek(0)
    header = index.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise StorageFailure("the byte index of the input file is damaged; materialize validated_input again")
    return int(_HEADER.unpack(header)[1])


def entries_end(index: BinaryIO) -> int:
    """Return the offset behind the last entry. Raises StorageFailure when `index` is not a byte index."""
    return _HEADER.size + read_count(index) * _ENTRY.size


def read_entries(index: BinaryIO, first: int, count: int) -> Iterator[IndexEntry]:
    """Yield the entries of lines `first` .. `first + count`, reading a few hundred at a time."""
    index.seek(_HEADER.size + first * _ENTRY.size)
    left = count
    while left > 0:
        step = min(left, 512)
        block = index.read(step * _ENTRY.size)
        if len(block) < step * _ENTRY.size:
            raise StorageFailure("the byte index of the input file is cut short; materialize validated_input again")
        yield from map(IndexEntry._make, _ENTRY.iter_unpack(block))
        left -= step
