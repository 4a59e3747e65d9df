"""The result index of a published chunk: for each of its lines, which journal record answers it.

    header  magic (8 bytes) | lines (u32) | reason (32 bytes, ASCII) of the lines without an answer
    entry   epoch (u32, 0 = no answer) | offset (u64) | length (u32) | outcome (u8)

Answers stay in the journals and are not copied; the merge reads them through this index, in input order.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from vllm_batch_dagster.core.errors import StorageFailure

MAGIC = b"VBRESLT1"
_HEADER = struct.Struct("<8sI32s")
_ENTRY = struct.Struct("<IQIB")

UNANSWERED, SUCCEEDED, FAILED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class ResultEntry:
    """Where a line's answer is: payload bytes `offset`..+`length` of the journal of `epoch`."""

    epoch: int = 0
    offset: int = 0
    length: int = 0
    outcome: int = UNANSWERED


NO_ANSWER = ResultEntry()


@dataclass(frozen=True, slots=True)
class ResultIndex:
    """`reason` is the error code of the lines without an answer."""

    reason: str
    entries: Sequence[ResultEntry]


class ResultTable:
    """The entries of one chunk while they are collected: 17 bytes a line. The first answer of a line wins."""

    def __init__(self, lines: int) -> None:
        self._packed = bytearray(lines * _ENTRY.size)
        self.lines = lines

    def put(self, position: int, entry: ResultEntry) -> bool:
        """Set the answer at `position` (0-based in the chunk). Returns False when it already has one."""
        if self.outcome(position) != UNANSWERED:
            return False
        start = position * _ENTRY.size
        _ENTRY.pack_into(self._packed, start, entry.epoch, entry.offset, entry.length, entry.outcome)
        return True

    def outcome(self, position: int) -> int:
        return self._packed[(position + 1) * _ENTRY.size - 1]

    def pack(self, reason: str) -> bytes:
        """Return the whole index as bytes."""
        return _HEADER.pack(MAGIC, self.lines, reason.encode("ascii")) + bytes(self._packed)


def read_results(index: BinaryIO) -> ResultIndex:
    """Read the index of one chunk. Raises StorageFailure when it is damaged."""
    header = index.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise StorageFailure("a chunk's result index is damaged; materialize the chunk again")
    _magic, lines, reason = _HEADER.unpack(header)
    if not reason.isascii():
        raise StorageFailure("a chunk's result index is damaged; materialize the chunk again")
    packed = index.read(lines * _ENTRY.size)
    if len(packed) < lines * _ENTRY.size:
        raise StorageFailure("a chunk's result index is cut short; materialize the chunk again")
    return ResultIndex(reason.rstrip(b"\0").decode("ascii"), tuple(_entries(packed)))


def _entries(packed: bytes) -> Iterator[ResultEntry]:
    for values in _ENTRY.iter_unpack(packed):
        yield ResultEntry(*values)
