"""The cursor of a reader of partial results: how far each chunk's journals have been read. Pure.

    v1                      nothing yet
    v1_0-11_12.1:20480      chunks 0..11 wholly given; of chunk 12 the journal of attempt 1 read to byte 20480
    v1_3.1:512.2:64         chunk 3 runs its second attempt
    v1_r7_0-0               with failed requests: the first 7 lines that lenient validation refused, and chunk 0

Refused lines stand before all chunks: they are known, and do not change, before the first chunk is begun.

A reader gets every line of a chunk once: the first answer that it meets, in whatever order attempts wrote them. Which
lines it has is exactly what stands before its places in the journals, so a cursor needs no list of lines.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from vllm_batch_dagster.core.errors import InvalidInput

_VERSION = "v1"
_REFUSED = re.compile(r"r([0-9]{1,9})")
_DONE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")
_OPEN = re.compile(r"([0-9]{1,9})((?:\.[0-9]{1,9}:[0-9]{1,18})+)")
_MOST_LETTERS = 1 << 16
_MOST_CHUNKS = 1 << 20

Places = Mapping[int, int]


@dataclass(frozen=True, slots=True)
class ResultCursor:
    """`done` are the chunks that were given whole; `open` those begun, each with attempt -> bytes read; `refused` how
    many of the refused lines were given."""

    done: frozenset[int] = frozenset()
    open: Mapping[int, Places] = field(default_factory=dict)
    refused: int = 0

    def __str__(self) -> str:
        opened = (
            f"{chunk}" + "".join(f".{epoch}:{offset}" for epoch, offset in sorted(places.items()))
            for chunk, places in sorted(self.open.items())
            if places
        )
        refused = (f"r{self.refused}",) if self.refused else ()
        return "_".join((_VERSION, *refused, *(f"{first}-{last}" for first, last in _runs(self.done)), *opened))


def read_cursor(text: str) -> ResultCursor:
    """Raises InvalidInput for a text that no ResultCursor has written."""
    version, *parts = text[:_MOST_LETTERS].split("_")
    done: set[int] = set()
    opened: dict[int, Places] = {}
    refused = 0
    if version != _VERSION or len(text) > _MOST_LETTERS:
        raise unknown_cursor(text)
    for part in parts:
        if run := _DONE.fullmatch(part):
            first, last = int(run[1]), int(run[2])
            if last - first >= _MOST_CHUNKS:
                raise unknown_cursor(text)
            done.update(range(first, last + 1))
        elif count := _REFUSED.fullmatch(part):
            refused = int(count[1])
        elif places := _OPEN.fullmatch(part):
            pairs = (pair.split(":") for pair in places[2].split(".")[1:])
            opened[int(places[1])] = {int(epoch): int(offset) for epoch, offset in pairs}
        else:
            raise unknown_cursor(text)
    return ResultCursor(frozenset(done), opened, refused)


def unknown_cursor(text: str) -> InvalidInput:
    return InvalidInput(
        f"Invalid 'after': '{text[:100]}' is no cursor of these results. Send one that this batch's results gave.",
        param="after",
        code="invalid_value",
    )


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the (first, last) of each run of neighbours."""
    first = last = None
    for number in sorted(numbers):
        if last is not None and number == last + 1:
            last = number
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = number
    if first is not None and last is not None:
        yield first, last
