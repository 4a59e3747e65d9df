"""One pass over an input file: every line checked, the byte index written. Called by validation.

This is strict mode, in which only good lines have entries and an error is enough to fail the batch. stages/leniency.py
refines it for lenient mode.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vllm_batch_dagster.core.byteindex import (
    IndexEntry,
    estimate_tokens,
    pack_entry,
    pack_header,
    read_count,
    read_entries,
)
from vllm_batch_dagster.core.chunking import ModelGroup
from vllm_batch_dagster.core.duplicates import DuplicateFilter, repeated_hashes
from vllm_batch_dagster.core.histogram import Histogram
from vllm_batch_dagster.core.lines import (
    EMBEDDINGS,
    CheckedLine,
    LineChecker,
    count_inputs,
    duplicate_id,
    find_custom_id,
    hash_custom_id,
    line_too_long,
)
from vllm_batch_dagster.core.models import LineError
from vllm_batch_dagster.stages.input_lines import line_numbers, numbered_lines


@dataclass(slots=True)
class Findings:
    """What a pass has found. `seen` are all requests; `groups`, `lengths` and `tokens` are of those that may run;
    `rejected` counts the others that do not keep them from running; `inputs` are those of embedding requests."""

    lengths: Histogram
    seen: int = 0
    tokens: int = 0
    inputs: int = 0
    rejected: int = 0
    groups: tuple[ModelGroup, ...] = ()


class Inspection(ABC):
    """What both modes have in common. `errors` lists at most `max_errors`, in input order once `run` has ended.
    `with_inputs` asks for the number of embedding inputs."""

    def __init__(self, checker: LineChecker, size: int, max_errors: int, *, with_inputs: bool) -> None:
        self._checker, self._max_errors, self._with_inputs = checker, max_errors, with_inputs
        self._duplicates = DuplicateFilter(size)
        self.errors: list[LineError] = []
        self.found = Findings(Histogram())

    def run(self, source: BinaryIO, index: BinaryIO) -> None:
        """Check every line of `source` and write the byte index to the file `index`."""
        self._inspect(source, index)
        self.errors = sorted(self.errors, key=lambda error: error.line or 0)[: self._max_errors]

    @abstractmethod
    def _inspect(self, source: BinaryIO, index: BinaryIO) -> None: ...

    @abstractmethod
    def _accept(self, number: int, entry: IndexEntry, line: CheckedLine) -> IndexEntry | None:
        """Take a good line into account. Returns its entry in what is being written, None for no entry."""

    @abstractmethod
    def _refuse(self, number: int, offset: int, raw: bytes | None, errors: tuple[LineError, ...]) -> IndexEntry | None:
        """Take a bad line into account, `raw` None for one over the limit. Returns its entry, None for no entry."""

    def _write_entries(self, source: BinaryIO, target: BinaryIO) -> int:
        """Write the header and an entry for each line that gets one. Returns their number."""
        # The line count is known only at the end, so the header is written twice.
        target.write(pack_header(0))
        entries = 0
        for entry in self._entries(source):
            self._duplicates.add(entry.id_hash)
            target.write(pack_entry(entry))
            entries += 1
        target.seek(0)
        target.write(pack_header(entries))
        target.flush()
        return entries

    def _entries(self, source: BinaryIO) -> Iterator[IndexEntry]:
        check = self._checker.check
        for number, offset, raw in numbered_lines(source):
            self.found.seen += 1
            if raw is None:
                entry = self._refuse(number, offset, None, (line_too_long(number),))
            elif isinstance(line := check(raw, number), CheckedLine):
                id_hash, tokens = hash_custom_id(line.custom_id), estimate_tokens(line.body)
                entry = self._accept(number, IndexEntry(offset, len(raw), id_hash, tokens), line)
                if self._with_inputs and line.url == EMBEDDINGS:
                    self.found.inputs += count_inputs(line.body)
            else:
                entry = self._refuse(number, offset, raw, line)
            if entry is not None:
                yield entry

    def _note(self, *errors: LineError) -> None:
        self.errors.extend(errors[: max(0, self._max_errors - len(self.errors))])

    def _duplicate_positions(self, packed: BinaryIO, source: BinaryIO) -> Iterator[tuple[int, IndexEntry]]:
        """Yield (position, entry) of lines whose custom_id stands on an earlier one: suspects of the filter first, then
        repeated hashes, and at last the ids themselves."""
        if not self._duplicates.suspects:
            return
        hashes = repeated_hashes((entry.id_hash for entry in all_entries(packed)), self._duplicates.suspects)
        if not hashes:
            return
        seen: set[str] = set()
        for position, entry in enumerate(all_entries(packed)):
            if entry.id_hash in hashes:
                source.seek(entry.offset)
                custom_id = find_custom_id(source.read(entry.length))
                if custom_id in seen:
                    yield position, entry
                elif custom_id is not None:
                    seen.add(custom_id)


class StrictInspection(Inspection):
    """Every line must be good."""

    _model = ""

    def _inspect(self, source: BinaryIO, index: BinaryIO) -> None:
        lines = self._write_entries(source, index)
        with Path(index.name).open("rb") as packed:
            self._note_duplicates(packed, source)
        self.found.groups = (ModelGroup(self._model, lines),)

    def _accept(self, number: int, entry: IndexEntry, line: CheckedLine) -> IndexEntry:
        self._model = line.model
        self.found.lengths.add(entry.tokens)
        self.found.tokens += entry.tokens
        return entry

    def _refuse(self, number: int, offset: int, raw: bytes | None, errors: tuple[LineError, ...]) -> None:
        self._note(*errors)

    def _note_duplicates(self, packed: BinaryIO, source: BinaryIO) -> None:
        number_of, most = line_numbers(source), len(self.errors) + self._max_errors
        for _position, entry in self._duplicate_positions(packed, source):
            if len(self.errors) >= most:  # as many as can be shown, whatever stands before them
                return
            self.errors.append(duplicate_id(number_of(entry.offset)))


def all_entries(packed: BinaryIO) -> Iterator[IndexEntry]:
    return read_entries(packed, 0, read_count(packed))
