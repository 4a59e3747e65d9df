"""Checks files of a batch by their digests, and says where in a file a damage is. Part of stages/verification.py.

A file is read a block at a time. Where the manifest has the CRC-32 of each block, they narrow a damage to one; the byte
index and the input file, read beside each other, often tell the very line.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from vllm_batch_dagster.core.byteindex import IndexEntry, estimate_tokens, read_count, read_entries
from vllm_batch_dagster.core.duplicates import DuplicateFilter, repeated_hashes
from vllm_batch_dagster.core.errors import NotFound, StorageFailure
from vllm_batch_dagster.core.lines import find_custom_id, hash_custom_id, read_line
from vllm_batch_dagster.core.manifest import BLOCK_BYTES, FileDigest, Manifest
from vllm_batch_dagster.core.models import Batch, File
from vllm_batch_dagster.core.ports import BatchStore, FileStore, Workspace
from vllm_batch_dagster.core.verification import Kind, Problem, VerifyReport, index_again
from vllm_batch_dagster.stages.digests import Progress, differing_blocks, digest_file
from vllm_batch_dagster.stages.input_lines import line_numbers

INDEX = "index.bin"
_ENTRIES_AT, _ENTRY_BYTES = 16, 24  # as core/byteindex.py lays them out
_MOST_PLACES = 20
_MOST_BYTES = 1 << 43  # a damaged offset may be beyond what a file can have
_RESTORE = "put the file back from a copy, or upload it again for a new batch; the answers are not touched by this"


class SourceCheck:
    """Checks the input file and the byte index of a batch against the store, the manifest and each other."""

    def __init__(
        self,
        batch: Batch,
        manifest: Manifest | None,
        store: BatchStore,
        files: FileStore,
        workspace: Workspace,
        report: VerifyReport,
        progress: Progress,
    ) -> None:
        self._batch, self._manifest, self._store, self._files = batch, manifest, store, files
        self._workspace, self._report, self._progress = workspace, report, progress

    def check(self, *, has_index: bool) -> None:
        """Look at both. `has_index`: the batch is past validation."""
        is_source_good = self._check_input()
        if not has_index:
            return
        is_index_good = self._check_index()
        if not (is_source_good and is_index_good and self._manifest):
            self._compare()
        if is_index_good:
            self._check_ids()

    def _check_input(self) -> bool:
        """Return False when the file is there but not as it was uploaded."""
        try:
            record = self._store.files.get(self._batch.input_file_id)
            with self._files.open(record.id) as source:
                found = digest_file(record.id, source, with_blocks=True, progress=self._progress)
        except NotFound:
            self._report.notes.append(f"the input file {self._batch.input_file_id} was deleted; it is not checked")
            return True
        self._report.checked["bytes"] += found.bytes
        self._compare_records(record)
        if (found.bytes, found.sha256) == (record.bytes, record.sha256):
            return True
        self._blame_input(record, found)
        return False

    def _compare_records(self, record: File) -> None:
        told = self._manifest.input if self._manifest else None
        if told and (told.name, told.bytes, told.sha256) != (record.id, record.bytes, record.sha256):
            message = "the manifest has another digest of the input file than the store"
            self._report.add(Problem(Kind.RECORD, record.id, message, "compare both with a copy of the file"))

    def _blame_input(self, record: File, found: FileDigest) -> None:
        told = self._manifest.input if self._manifest else None
        blocks = differing_blocks(told, found) if told else []
        with self._files.open(record.id) as source:
            number_of = line_numbers(source)
            for block in blocks[:_MOST_PLACES]:
                offset = block * BLOCK_BYTES
                first, last = number_of(offset), number_of(min(offset + BLOCK_BYTES, found.bytes))
                message = f"bytes {offset} to {offset + BLOCK_BYTES} (lines {first} to {last}) are not as uploaded"
                self._report.add(Problem(Kind.INPUT, record.id, message, _RESTORE, first, offset))
        if not blocks:
            message = f"the file is not as uploaded: sha256 {found.sha256} of {found.bytes} bytes, not {record.sha256}"
            self._report.add(Problem(Kind.INPUT, record.id, message, _RESTORE))

    def _check_index(self) -> bool:
        path = self._workspace.index_path(self._batch.id)
        try:
            with path.open("rb") as index:
                found = digest_file(INDEX, index, with_blocks=True, progress=self._progress)
                lines = read_count(index)
        except (OSError, StorageFailure) as error:
            self._blame_index(f"the byte index cannot be read: {error}")
            return False
        self._report.checked["bytes"] += found.bytes
        if self._manifest and found.sha256 != self._manifest.index.sha256:
            for block in (differing_blocks(self._manifest.index, found) or [0])[:_MOST_PLACES]:
                offset = block * BLOCK_BYTES
                self._blame_index(f"bytes {offset} to {offset + BLOCK_BYTES} are not as written", None, offset)
            return False
        planned = sum(chunk.range.line_count for chunk in self._store.chunks.list(self._batch.id))
        if lines != planned:
            self._blame_index(f"it has {lines} entries, and the chunks {planned} lines", None, 8)
        return lines == planned

    def _blame_index(self, message: str, line: int | None = None, offset: int | None = None) -> None:
        self._report.add(Problem(Kind.INDEX, INDEX, message, index_again(self._batch.id), line, offset))

    def _compare(self) -> None:
        """Read index and input beside each other, and name the lines in which they differ."""
        try:
            with ExitStack() as stack:
                source = stack.enter_context(self._files.open(self._batch.input_file_id))
                index = stack.enter_context(self._workspace.index_path(self._batch.id).open("rb"))
                places = stack.enter_context(self._files.open(self._batch.input_file_id))
                self._name_lines(index, source, places)
        except (NotFound, OSError, StorageFailure):
            return  # said already

    def _name_lines(self, index: BinaryIO, source: BinaryIO, places: BinaryIO) -> None:
        is_index_blamed = self._report.has(Kind.INDEX)
        named = 0
        for position, entry in enumerate(read_entries(index, 0, read_count(index))):
            if (message := _mismatch(source, entry)) is None:
                continue
            if is_index_blamed or not self._report.has(Kind.INPUT):
                offset = _ENTRIES_AT + position * _ENTRY_BYTES
                self._blame_index(f"entry {position + 1}: {message}", position + 1, offset)
            else:
                number = line_numbers(places)(entry.offset)
                problem = Problem(Kind.INPUT, self._batch.input_file_id, message, _RESTORE, number, entry.offset)
                self._report.add(problem)
            if (named := named + 1) >= _MOST_PLACES:
                return

    def _check_ids(self) -> None:
        """Look for a custom_id that stands twice in the byte index, within the memory of core/duplicates.py."""
        seen = DuplicateFilter(self._workspace.index_path(self._batch.id).stat().st_size * 4)
        for id_hash in self._hashes():
            seen.add(id_hash)
            self._report.checked["lines"] += 1
        if seen.suspects and (repeated := repeated_hashes(self._hashes(), seen.suspects)):
            self._blame_index(f"{len(repeated)} custom_ids stand twice in it")

    def _hashes(self) -> Iterator[int]:
        with self._workspace.index_path(self._batch.id).open("rb") as index:
            for entry in read_entries(index, 0, read_count(index)):
                yield entry.id_hash


def _mismatch(source: BinaryIO, entry: IndexEntry) -> str | None:
    """Return how an index entry and the bytes it points at differ, None when they agree."""
    source.seek(min(entry.offset, _MOST_BYTES))
    raw = source.read(min(entry.length, BLOCK_BYTES * 64))
    end = source.read(1)
    if len(raw) != entry.length or raw[-1:] in (b"\n", b"\r") or end not in (b"\n", b"\r", b""):
        return "the line does not lie where the byte index says"
    custom_id = find_custom_id(raw)
    if custom_id is None or hash_custom_id(custom_id) != entry.id_hash:
        return "the line has another custom_id than the byte index says"
    try:
        tokens = estimate_tokens(bytes(read_line(raw).body))
    except ValueError:
        return "the line is no request any more"
    return None if tokens == entry.tokens else "the line has another length than the byte index says"
