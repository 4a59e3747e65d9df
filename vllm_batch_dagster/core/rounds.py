"""What the journals of a chunk say of its repair rounds. Pure; read by an attempt that resumes, and by the sealing.

An answer is counted once: the copy of one that is accepted late has the round of the original.
"""

from dataclasses import dataclass

from vllm_batch_dagster.core.answers import read_answer
from vllm_batch_dagster.core.journal import LENGTH_FLAW, REPAIRED, SCHEMA_FLAW, UNREPAIRED, JournalRecord
from vllm_batch_dagster.core.models import RepairCounts, Usage


class RoundTally:
    """Which rounds of which lines have been counted: one byte a line, so at most eight rounds. `counts` is what the
    answers so far make, without the lines that still wait for an accepted one."""

    def __init__(self, lines: int) -> None:
        self._seen = bytearray(lines)
        self.counts = RepairCounts()

    def add(self, position: int, record: JournalRecord) -> Usage:
        """Count an answer and return its tokens, none for a copy. `position` is 0-based in the chunk."""
        usage = self.usage_of(position, record)
        if not record.repair:
            return usage
        self.counts += RepairCounts(
            repaired=record.repair == REPAIRED,
            unrepaired=record.repair == UNREPAIRED,
            repeats=not record.is_final,
            repeat_tokens=usage.total_tokens if record.round else 0,
        )
        return usage

    def add_given_up(self) -> None:
        """A line ends with an answer that was to be asked again."""
        self.counts += RepairCounts(unrepaired=1, repeats=-1)

    def usage_of(self, position: int, record: JournalRecord) -> Usage:
        """Return the tokens of an answer, none the second time. `position` is 0-based in the chunk."""
        bit = 1 << record.round
        if not record.ok or self._seen[position] & bit:
            return Usage()
        self._seen[position] |= bit
        return read_answer(bytes(record.body)).usage


@dataclass(frozen=True, slots=True)
class Tried:
    """The last success of a line that has no accepted answer yet, and how often it was asked again for which flaw."""

    record: JournalRecord
    lengths: int = 0
    schemas: int = 0


def next_tried(before: Tried | None, record: JournalRecord) -> Tried:
    """Return what is known after `record`, which is not final."""
    known = before or Tried(record)
    if not record.ok:
        return known
    return Tried(record, known.lengths + (record.repair == LENGTH_FLAW), known.schemas + (record.repair == SCHEMA_FLAW))
