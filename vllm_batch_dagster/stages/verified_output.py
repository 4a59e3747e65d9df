"""Compares the merged files of a batch with what its journals say, byte by byte. Part of stages/verification.py.

Both files are read once, beside the lines that must stand in them, and hashed on the way. A changed byte does not shift
what follows, so each line is read by its length, and the next one is compared as if nothing had happened.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO

import msgspec

from vllm_batch_dagster.core.lines import hash_custom_id
from vllm_batch_dagster.core.merging import read_custom_id, render_rejection
from vllm_batch_dagster.core.models import Batch, File
from vllm_batch_dagster.core.ports import FileStore, Workspace
from vllm_batch_dagster.core.verification import Kind, Problem, VerifyReport, merge_again
from vllm_batch_dagster.stages.digests import Progress
from vllm_batch_dagster.stages.input_order import refused_lines
from vllm_batch_dagster.stages.verified_chunks import ChunkCheck, ExpectedLine, PublishedChunk

_BLOCK_BYTES = 1 << 20
_MOST_STRAYS = 3  # lines in a row that are nowhere near: bytes were lost or put in
_MOST_ODDITIES = 1000
_by_offset = itemgetter(0)


def expected_lines(
    batch: Batch, published: Sequence[PublishedChunk], files: FileStore, workspace: Workspace, report: VerifyReport
) -> Iterator[ExpectedLine]:
    """Yield every line of the merged files, in the order of the input file."""
    streams = [
        _lines_of(batch, tuple(group), files, workspace, report)
        for _model, group in groupby(published, key=lambda each: each.chunk.range.model)
    ]
    yield from merge(*streams, _refusals(batch, workspace), key=_by_offset)


def _lines_of(
    batch: Batch, published: Iterable[PublishedChunk], files: FileStore, workspace: Workspace, report: VerifyReport
) -> Iterator[ExpectedLine]:
    for each in published:
        yield from ChunkCheck(batch, each, files, workspace, report).lines()


def _refusals(batch: Batch, workspace: Workspace) -> Iterator[ExpectedLine]:
    for refused in refused_lines(batch, workspace):
        line = render_rejection(batch.id, refused)
        yield ExpectedLine(refused.offset, hash_custom_id(refused.custom_id), False, line, False)


@dataclass(slots=True)
class _Oddity:
    """A line that is not as expected. It is a problem at once (`is_sure`), or only if the whole file has changed."""

    line: int
    offset: int
    message: str
    is_sure: bool


class MergedFile:
    """One of the two files while it is compared. `record` is what the store knows of it."""

    def __init__(
        self, kind: Kind, batch_id: str, record: File, content: BinaryIO, report: VerifyReport, progress: Progress
    ) -> None:
        self._kind, self._batch_id, self._record, self._content = kind, batch_id, record, content
        self._report, self._progress = report, progress
        self._sha = hashlib.sha256()
        self._ahead = b""
        self._offset = self._strays = self.lines = 0
        self._oddities: list[_Oddity] = []

    @property
    def is_lost(self) -> bool:
        """True when lines no longer stand where they should, so that nothing more can be said of single ones."""
        return self._strays >= _MOST_STRAYS

    def expect(self, expected: ExpectedLine) -> None:
        """Compare the next line. One whose answer is damaged can only be recognised by its custom_id."""
        if self.is_lost:
            return
        if expected.line is None:
            self._take_known(expected.id_hash)
            return
        found = self._read(len(expected.line))
        if found != expected.line:
            self._note_difference(found, expected)
        else:
            self._strays = 0
        self._advance(found)

    def has_next(self, id_hash: int) -> bool:
        """True when the next line is of this custom_id."""
        self._ahead = self._ahead or self._content.readline()
        return _hash_of(self._ahead) == id_hash

    def conclude(self) -> None:
        """Read what is left, and compare the digest of the whole."""
        rest = self._offset
        while block := self._read(_BLOCK_BYTES):
            self._sha.update(block)
            self._offset += len(block)
            self._progress(len(block))
        self._report.checked["bytes"] += self._offset
        is_changed = (self._offset, self._sha.hexdigest()) != (self._record.bytes, self._record.sha256)
        for oddity in self._oddities:
            if oddity.is_sure or is_changed:
                self._blame(oddity.message, oddity.line, oddity.offset)
        if rest < self._offset and not self.is_lost:
            self._blame(f"{self._offset - rest} bytes stand behind the last line", self.lines + 1, rest)
        elif is_changed and not self._oddities:
            self._blame(
                f"the file is not as published: sha256 {self._sha.hexdigest()}, {self._offset} bytes", None, None
            )

    def _take_known(self, id_hash: int) -> None:
        line = self._ahead or self._content.readline()
        self._ahead = b""
        if _hash_of(line) != id_hash:
            self._oddities.append(_Oddity(self.lines + 1, self._offset, "another request stands here", False))
        self._advance(line)

    def _read(self, length: int) -> bytes:
        ahead, self._ahead = self._ahead[:length], self._ahead[length:]
        return ahead + self._content.read(length - len(ahead))

    def _note_difference(self, found: bytes, expected: ExpectedLine) -> None:
        assert expected.line is not None
        if not found:
            message, place = "the line is missing: the file is cut short", 0
            self._strays = _MOST_STRAYS
        else:
            pairs = zip(found, expected.line, strict=False)
            place = next((at for at, (one, other) in enumerate(pairs) if one != other), len(found))
            message = (
                "the line differs from its journal record" if expected.is_answer else "the line is not as published"
            )
            self._strays = 0 if _is_near(found, expected.line) else self._strays + 1
        if len(self._oddities) < _MOST_ODDITIES:
            offset = self._offset + place
            self._oddities.append(_Oddity(self.lines + 1, offset, message, expected.is_answer))

    def _advance(self, found: bytes) -> None:
        self._sha.update(found)
        self._offset += len(found)
        self.lines += 1
        self._progress(len(found))

    def _blame(self, message: str, line: int | None, offset: int | None) -> None:
        problem = Problem(self._kind, self._record.id, message, merge_again(self._batch_id), line, offset)
        self._report.add(problem)


def _is_near(found: bytes, expected: bytes) -> bool:
    """True when most of the line is right: a shifted one agrees by chance only."""
    differing = sum(one != other for one, other in zip(found, expected, strict=False))
    return len(found) == len(expected) and differing * 2 < len(expected)


def _hash_of(line: bytes) -> int | None:
    try:
        return hash_custom_id(read_custom_id(line))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def compare_files(lines: Iterable[ExpectedLine], output: MergedFile | None, errors: MergedFile | None) -> int:
    """Take every line and compare it with the file in which it must stand. Returns how many had no file to stand in."""
    homeless = 0
    for expected in lines:
        ok = expected.ok
        if ok is None:
            ok = output is not None and (errors is None or output.has_next(expected.id_hash))
        target = output if ok else errors
        if target is None:
            homeless += 1
        else:
            target.expect(expected)
    for each in (output, errors):
        if each is not None:
            each.conclude()
    return homeless
