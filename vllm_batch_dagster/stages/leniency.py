"""Lenient mode: bad lines are set aside with their reason, and what runs is grouped by model. Called by validation.

The pass writes an entry for every line to a scratch file, and a byte a line tells its group. Then the byte index is
written from it: the entries of each model, and behind them what was refused (core/rejections.py). Memory is a byte a
line; the scratch files are gone when they are closed, or when the process dies.
"""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import msgspec

from vllm_batch_dagster.core.byteindex import IndexEntry, pack_entry, pack_header
from vllm_batch_dagster.core.chunking import ModelGroup
from vllm_batch_dagster.core.lines import CheckedLine, LineChecker, duplicate_id, find_custom_id, hash_custom_id
from vllm_batch_dagster.core.models import LineError
from vllm_batch_dagster.core.rejections import (
    Rejection,
    marks_needed,
    pack_count,
    pack_rejection,
    substitute_id,
    unpack_rejection,
)
from vllm_batch_dagster.stages.input_lines import line_numbers
from vllm_batch_dagster.stages.inspection import Inspection, all_entries

MAX_MODELS = 16
_REFUSED, _NAMELESS, _DUPLICATE = 255, 254, 253  # a line's group, when that is no model's


class LenientInspection(Inspection):
    """A bad line is refused, and only that line. `errors` are the reasons."""

    def __init__(
        self, checker: LineChecker, size: int, max_errors: int, *, with_inputs: bool, max_models: int = MAX_MODELS
    ) -> None:
        super().__init__(checker, size, max_errors, with_inputs=with_inputs)
        self._max_models = min(max_models, MAX_MODELS)
        self._models: dict[str, int] = {}
        self._group_of = bytearray()
        self._marks = 0
        self._reasons: BinaryIO

    def _inspect(self, source: BinaryIO, index: BinaryIO) -> None:
        with ExitStack() as stack:
            folder = Path(index.name).parent
            packed, self._reasons = (stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(2))
            spools: list[BinaryIO] = [
                stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(self._max_models)
            ]
            trailer = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            self._write_entries(source, packed)
            for position, _entry in self._duplicate_positions(packed, source):
                was_refused = self._group_of[position] == _REFUSED
                self._group_of[position] = _NAMELESS if was_refused else _DUPLICATE
            self._sort(packed, source, spools, trailer)
            self._assemble(spools, trailer, index)

    def _accept(self, number: int, entry: IndexEntry, line: CheckedLine) -> IndexEntry:
        self._marks = max(self._marks, marks_needed(line.custom_id))
        group = self._models.setdefault(line.model, len(self._models))
        if group >= self._max_models:
            del self._models[line.model]
            self._set_aside(entry.offset, line.custom_id, self._too_many_models(line.model, number))
            return entry
        self._group_of.append(group)
        return entry

    def _refuse(self, number: int, offset: int, raw: bytes | None, errors: tuple[LineError, ...]) -> IndexEntry:
        own = None if raw is None else find_custom_id(raw)
        custom_id = own or ""
        self._marks = max(self._marks, marks_needed(custom_id))
        self._set_aside(offset, custom_id, *errors, group=_NAMELESS if own is None else _REFUSED)
        # Without an id of its own there is nothing to compare: it must not be looked for in the line.
        length = 0 if own is None or raw is None else len(raw)
        return IndexEntry(offset, length, hash_custom_id(custom_id), 0)

    def _set_aside(self, offset: int, custom_id: str, *errors: LineError, group: int = _REFUSED) -> None:
        self._note(*errors)
        first = errors[0]
        rejection = Rejection(offset, first.line or 0, custom_id, first.code, first.message)
        self._reasons.write(pack_rejection(rejection))
        self._group_of.append(group)

    def _too_many_models(self, model: str, number: int) -> LineError:
        message = f"The model '{model[:100]}' is one too many: a batch may name at most {self._max_models} models."
        return LineError("too_many_models", message, "body.model", number)

    def _sort(self, packed: BinaryIO, source: BinaryIO, spools: list[BinaryIO], trailer: BinaryIO) -> None:
        """Write each entry to the spool of its model, and the refused lines to `trailer`."""
        self._reasons.seek(0)
        number_of, sizes, found = line_numbers(source), [0] * len(self._models), self.found
        for entry, group in zip(all_entries(packed), self._group_of, strict=True):
            if group < len(sizes):
                spools[group].write(pack_entry(entry))
                sizes[group] += 1
                found.lengths.add(entry.tokens)
                found.tokens += entry.tokens
                continue
            if group == _DUPLICATE:
                rejection = self._reject_duplicate(entry, number_of(entry.offset))
            else:
                rejection = unpack_rejection(self._reasons.readline())
                if group == _NAMELESS:
                    rejection = msgspec.structs.replace(rejection, custom_id=self._substitute_id(rejection.line))
            trailer.write(pack_rejection(rejection))
            found.rejected += 1
        found.groups = tuple(ModelGroup(*pair) for pair in zip(self._models, sizes, strict=True) if pair[1])

    def _reject_duplicate(self, entry: IndexEntry, number: int) -> Rejection:
        error = duplicate_id(number)
        if len(self.errors) < 2 * self._max_errors:  # as many as can be shown, whatever stands before them
            self.errors.append(error)
        return Rejection(entry.offset, number, self._substitute_id(number), error.code, error.message)

    def _substitute_id(self, number: int) -> str:
        return substitute_id(number, self._marks)  # known when the whole file was seen

    def _assemble(self, spools: list[BinaryIO], trailer: BinaryIO, index: BinaryIO) -> None:
        index.write(pack_header(sum(group.lines for group in self.found.groups)))
        for spool in spools:
            spool.seek(0)
            shutil.copyfileobj(spool, index)
        if self.found.rejected:
            index.write(pack_count(self.found.rejected))
            trailer.seek(0)
            shutil.copyfileobj(trailer, index)
