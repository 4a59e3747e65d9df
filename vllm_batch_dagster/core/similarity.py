"""Finds texts that say almost the same as an earlier one. Pure; bounded memory; called by stages/curation.py.

A text is its set of runs of three words, of which the 64 smallest hashes are kept (a bottom-k sketch): the share that
two texts have in common follows from their sketches. Two that share most of their runs almost surely share one of their
four smallest, so only texts that do are compared.
"""

import heapq
import re
from array import array
from collections import deque
from collections.abc import Sequence
from zlib import crc32

SKETCH = 64
BANDS = 4
RUN = 3
WINDOW = 50_000
COMPARED = 25  # texts under one hash, the newest: many that share a template must not cost a comparison each
_WORD = re.compile(r"\w+")
_MIX, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1

Sketch = Sequence[int]


def sketch(text: str) -> Sketch:
    """Return the 64 smallest hashes of a text's runs of three words, ascending; empty for a text without words."""
    words = _WORD.findall(text.casefold())
    runs = {" ".join(words[at : at + RUN]) for at in range(max(1, len(words) - RUN + 1))} if words else set()
    return array("Q", heapq.nsmallest(SKETCH, {_hash(run) for run in runs}))


def _hash(run: str) -> int:
    # crc32 alone is linear: the smallest of its values are no fair sample.
    value = (crc32(run.encode("utf-8", "surrogatepass")) * _MIX) & _MASK
    return ((value ^ (value >> 32)) * _MIX) & _MASK


def resemblance(one: Sketch, other: Sketch) -> float:
    """Return the share of runs in common, 0 to 1; exact for texts of at most 64 runs together."""
    if not one or not other:
        return float(not one and not other)
    both = heapq.nsmallest(SKETCH, {*one, *other})
    common = set(one) & set(other)
    return sum(value in common for value in both) / len(both)


class NearDuplicates:
    """Remembers the last 50,000 texts that were kept: about a kilobyte each."""

    def __init__(self, similarity: float, window: int = WINDOW) -> None:
        self._similarity, self._window = similarity, window
        self._kept: dict[int, Sketch] = {}
        self._order: deque[int] = deque()
        self._by_hash: dict[int, list[int]] = {}
        self._next = 0

    def seen(self, text: str) -> bool:
        """True when a text resembles one that was kept; otherwise it is kept itself."""
        marks = sketch(text)
        near = {at for mark in _places(marks) for at in self._by_hash.get(mark, ())[-COMPARED:]}
        if any(resemblance(marks, self._kept[at]) >= self._similarity for at in near):
            return True
        self._keep(marks)
        return False

    def _keep(self, marks: Sketch) -> None:
        at, self._next = self._next, self._next + 1
        self._kept[at] = marks
        self._order.append(at)
        for mark in _places(marks):
            self._by_hash.setdefault(mark, []).append(at)
        if len(self._order) > self._window:
            self._forget(self._order.popleft())

    def _forget(self, at: int) -> None:
        for mark in _places(self._kept.pop(at)):
            self._by_hash[mark].remove(at)
            if not self._by_hash[mark]:
                del self._by_hash[mark]


def _places(marks: Sketch) -> Sequence[int]:
    """Return the hashes under which a text is found; all texts without words are under one."""
    return marks[:BANDS] or (0,)
