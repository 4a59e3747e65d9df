"""The lines that lenient validation refused: stored behind the entries of the byte index, read by the merge.

    trailer  lines (u64) | for each line, in input order, one JSON object and a newline

An index without refused lines has no trailer.
"""

import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from vllm_batch_dagster.core.byteindex import entries_end
from vllm_batch_dagster.core.errors import StorageFailure

_COUNT = struct.Struct("<Q")
_PREFIX, _MARK = "invalid-line-", "-"
_LIKE_OURS = re.compile(rf"{_PREFIX}[0-9]+({_MARK}*)")


class Rejection(msgspec.Struct, frozen=True):
    """One refused line. `offset` is its first byte in the input file, `line` its number there from 1.

    `custom_id` is the line's own, or made up when it has none, or one that an earlier line has.
    """

    offset: int
    line: int
    custom_id: str
    code: str
    message: str


_decoder = msgspec.json.Decoder(Rejection)


def substitute_id(line: int, marks: int = 0) -> str:
    """Return the custom_id under which a line without a usable one stands in the error file. `marks` keep it apart
    from those of the user: the greatest `marks_needed` of the file."""
    return f"{_PREFIX}{line}{_MARK * marks}"


def marks_needed(custom_id: str) -> int:
    """Return how many marks our ids need so that none is the user's `custom_id`; 0 for one that is not like ours."""
    if not custom_id.startswith(_PREFIX):  # nearly always
        return 0
    found = _LIKE_OURS.fullmatch(custom_id)
    return len(found[1]) + 1 if found else 0


def pack_count(rejections: int) -> bytes:
    return _COUNT.pack(rejections)


def pack_rejection(rejection: Rejection) -> bytes:
    return msgspec.json.encode(rejection) + b"\n"


def unpack_rejection(packed: bytes) -> Rejection:
    """Raises StorageFailure."""
    try:
        return _decoder.decode(packed)
    except msgspec.DecodeError as error:
        raise _damaged() from error


def count_rejections(index: BinaryIO) -> int:
    """Return how many lines were refused, and leave `index` at the first of them. Raises StorageFailure."""
    index.seek(entries_end(index))
    head = index.read(_COUNT.size)
    if not head:
        return 0
    if len(head) < _COUNT.size:
        raise _damaged()
    return int(_COUNT.unpack(head)[0])


def read_rejections(index: BinaryIO) -> Iterator[Rejection]:
    """Yield the refused lines of a byte index in input order. Raises StorageFailure when some are missing."""
    for _ in range(count_rejections(index)):
        yield unpack_rejection(index.readline())


def _damaged() -> StorageFailure:
    return StorageFailure("the byte index of the input file is cut short; materialize validated_input again")
