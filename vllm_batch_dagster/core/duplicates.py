"""Finds repeated custom_ids in a file of any size within fixed memory. Used by validation while it streams the lines.

A bit table answers "surely new" for most lines; the few suspects are settled by a second pass over the byte
index (hashes) and, for those that really collide, by the ids themselves. 16 bits a line make about 1 suspect in
16 x 2 lines at worst; the table never takes more than 32 MiB.
"""

from collections.abc import Iterable

_MIN_BITS = 1 << 16
_MAX_BITS = 1 << 28
_MIN_LINE_BYTES = 64


class DuplicateFilter:
    """Remembers hashes approximately: `suspects` holds every hash that may have been seen twice."""

    def __init__(self, file_bytes: int) -> None:
        lines = file_bytes // _MIN_LINE_BYTES + 1
        bits = min(max(_MIN_BITS, 1 << (16 * lines - 1).bit_length()), _MAX_BITS)
        self._mask = bits - 1
        self._table = bytearray(bits // 8)
        self.suspects: set[int] = set()

    def add(self, id_hash: int) -> None:
        """Record the hash of the next line's custom_id."""
        bit = id_hash & self._mask
        byte, flag = bit >> 3, 1 << (bit & 7)
        if self._table[byte] & flag:
            self.suspects.add(id_hash)
        else:
            self._table[byte] |= flag


def repeated_hashes(hashes: Iterable[int], suspects: set[int]) -> set[int]:
    """Return those of the `suspects` that stand more than once in `hashes`."""
    seen: set[int] = set()
    repeated: set[int] = set()
    for id_hash in hashes:
        if id_hash in suspects:
            (repeated if id_hash in seen else seen).add(id_hash)
    return repeated
