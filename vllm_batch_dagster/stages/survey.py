"""Reads an input file, or its byte index, to choose the lines that a pre-flight looks at. Memory stays the same.

Called by stages/preflight.py: the whole file for POST /v1/batches/validate, the index alone for the Dagster UI.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from vllm_batch_dagster.core.byteindex import read_count, read_entries
from vllm_batch_dagster.core.lines import MAX_LINE_BYTES
from vllm_batch_dagster.core.prompts import read_line
from vllm_batch_dagster.core.sampling import DistinctCounter, LinePlace, LineSample

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Survey:
    """Lines to look at: `sample` is fair and in random order, `longest` the most suspicious. `repeats` None: not
    looked for."""

    lines: int
    sample: Sequence[LinePlace]
    longest: Sequence[LinePlace]
    repeats: int | None = None
    repeats_exact: bool = True


def survey_file(source: BinaryIO, seed: str, size: int, longest: int) -> Survey:
    """Choose from all lines that are not blank, bad ones too, and count the bodies that stand there twice."""
    sample, bodies, readable = LineSample(size, longest, seed), DistinctCounter(), 0
    for place, raw in _lines(source):
        sample.offer(place)
        if line := read_line(raw):
            readable += 1
            bodies.add(int.from_bytes(hashlib.blake2b(line.body, digest_size=8).digest(), "little"))
    repeats = max(0, readable - bodies.count)
    return Survey(sample.offered, sample.drawn(), sample.longest(), repeats, bodies.is_exact)


def survey_index(index: BinaryIO, seed: str, size: int) -> Survey:
    """Choose from the lines of a byte index, at the cost of the chosen ones. Their numbers count good lines."""
    lines = read_count(index)
    chosen = random.Random(seed).sample(range(lines), min(size, lines))
    places = []
    for position in chosen:
        (entry,) = read_entries(index, position, 1)
        places.append(LinePlace(position + 1, entry.offset, entry.length))
    return Survey(lines, places, ())


def _lines(source: BinaryIO) -> Iterator[tuple[LinePlace, bytes]]:
    """Yield the lines that are not blank and not over the limit, which validation reports."""
    source.seek(0)
    offset = number = 0
    while piece := source.readline(MAX_LINE_BYTES + 2):
        number += 1
        length, raw = len(piece), piece.rstrip(b"\r\n")
        if len(raw) <= MAX_LINE_BYTES and raw.strip():
            yield LinePlace(number, offset, len(raw)), raw
        while not piece.endswith(b"\n") and (piece := source.readline(_PIECE_BYTES)):
            length += len(piece)
        offset += length
