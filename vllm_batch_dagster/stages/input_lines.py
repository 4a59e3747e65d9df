"""Reads an input file line by line, in memory that does not follow its size or the length of a line. For validation."""

from collections.abc import Callable, Iterator
from typing import BinaryIO

from vllm_batch_dagster.core.lines import MAX_LINE_BYTES


def numbered_lines(source: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (1-based number, offset, bytes without the line's end) of the lines that are not blank.

    None stands for the bytes of a line over the limit: it is passed over in pieces and never held whole.
    """
    source.seek(0)
    offset = number = 0
    longest = MAX_LINE_BYTES + len(b"\r\n")
    while piece := source.readline(longest):
        number += 1
        length, raw = len(piece), piece.rstrip(b"\r\n")
        if length == longest and not piece.endswith(b"\n"):
            length += _skip_line(source)
            yield number, offset, None
        elif len(raw) > MAX_LINE_BYTES:
            yield number, offset, None
        elif raw and not raw.isspace():
            yield number, offset, raw
        offset += length


def _skip_line(source: BinaryIO) -> int:
    """Read on to the end of the line. Returns how many bytes that were."""
    skipped = 0
    while piece := source.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def line_numbers(source: BinaryIO) -> Callable[[int], int]:
    """Return a function from ascending offsets to line numbers. It reads the file at most once, and only when asked."""
    state = {"offset": 0, "number": 1}

    def number_of(offset: int) -> int:
        source.seek(state["offset"])
        left = offset - state["offset"]
        while left > 0:
            block = source.read(min(left, 1 << 20))
            state["number"] += block.count(b"\n")
            left -= len(block)
        state["offset"] = offset
        return state["number"]

    return number_of
