"""Looks at a file of any size within fixed memory: a fair sample of its lines, its longest ones, how many differ.

Used by the pre-flight while it streams the lines. A seed makes every figure repeatable.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_KEPT = 1 << 16
_HASH_BITS = 64


@dataclass(frozen=True, slots=True, order=True)
class LinePlace:
    """Where a line lies: its 1-based number in the file, `offset` and `length` in bytes."""

    number: int
    offset: int
    length: int


class LineSample:
    """Keeps `size` of the lines that are offered, each with the same chance, and beside them the `longest` ones."""

    def __init__(self, size: int, longest: int, seed: str) -> None:
        self._size, self._most_long = size, longest
        self._random = random.Random(seed)
        self._kept: list[LinePlace] = []
        self._long: list[tuple[int, LinePlace]] = []
        self.offered = 0

    def offer(self, place: LinePlace) -> None:
        self.offered += 1
        if len(self._kept) < self._size:
            self._kept.append(place)
        elif (slot := self._random.randrange(self.offered)) < self._size:
            self._kept[slot] = place
        if len(self._long) < self._most_long:
            heapq.heappush(self._long, (place.length, place))
        elif self._long and place.length > self._long[0][0]:
            heapq.heapreplace(self._long, (place.length, place))

    def drawn(self) -> Sequence[LinePlace]:
        """Return the sample in random order, so that any first part of it is a fair sample too."""
        shuffled = sorted(self._kept)
        self._random.shuffle(shuffled)
        return shuffled

    def longest(self) -> Sequence[LinePlace]:
        """Return the longest lines, longest first."""
        return [place for _length, place in sorted(self._long, key=lambda pair: (-pair[0], pair[1].number))]


class DistinctCounter:
    """Counts different hashes (64 bits): exactly up to 65,536 of them, above that within about half a percent.

    It keeps the hashes that end in `level` zero bits and raises the level whenever they become too many (adaptive
    sampling): each one kept then stands for 2^level.
    """

    def __init__(self, most: int = _MOST_KEPT) -> None:
        self._most = most
        self._level = 0
        self._kept: set[int] = set()

    @property
    def is_exact(self) -> bool:
        return self._level == 0

    @property
    def count(self) -> int:
        return len(self._kept) << self._level

    def add(self, value: int) -> None:
        if value & self._mask:
            return
        self._kept.add(value)
        while len(self._kept) > self._most and self._level < _HASH_BITS:
            self._level += 1
            self._kept = {kept for kept in self._kept if not kept & self._mask}

    @property
    def _mask(self) -> int:
        return (1 << self._level) - 1
