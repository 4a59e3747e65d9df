"""Checks every journal of a batch, also the parts that no published answer lies in. Part of stages/verification.py.

A journal that the manifest knows must begin with the very bytes that it had; one that is younger must consist of intact
records, but for a torn tail: that is what a death leaves, and what a run is just writing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_batch_dagster.core.journal import damaged_places
from vllm_batch_dagster.core.manifest import ChunkEntry, JournalDigest
from vllm_batch_dagster.core.models import Chunk
from vllm_batch_dagster.core.ports import Workspace
from vllm_batch_dagster.core.verification import Kind, Problem, VerifyReport, rerun_chunk
from vllm_batch_dagster.stages.digests import Progress, digest_file

_MOST_PLACES = 20


def journal_paths(workspace: Workspace, chunk: Chunk) -> Iterator[tuple[int, Path]]:
    """Yield (epoch, path) of the journals that a chunk has."""
    for epoch in range(1, chunk.epoch + 1):
        path = workspace.journal_path(chunk.batch_id, chunk.index, epoch)
        if path.exists():
            yield epoch, path


class JournalCheck:
    """Checks the journals of one batch. `told` are the chunks of its manifest."""

    def __init__(
        self, workspace: Workspace, told: Sequence[ChunkEntry], report: VerifyReport, progress: Progress
    ) -> None:
        self._workspace, self._report, self._progress = workspace, report, progress
        self._told = {entry.index: {each.epoch: each for each in entry.journals} for entry in told}

    def check(self, chunk: Chunk) -> None:
        told = self._told.get(chunk.index, {})
        there = dict(journal_paths(self._workspace, chunk))
        for epoch in sorted(told.keys() - there.keys()):
            self._blame(chunk, epoch, "the journal is missing")
        for epoch, path in there.items():
            self._report.checked["journals"] += 1
            if epoch in told:
                self._check_told(chunk, path, told[epoch])
            else:
                self._check_young(chunk, epoch, path)

    def _check_told(self, chunk: Chunk, path: Path, told: JournalDigest) -> None:
        with path.open("rb") as journal:
            found = digest_file(path.name, journal, length=told.bytes, progress=self._progress)
        self._report.checked["bytes"] += found.bytes
        if (found.bytes, found.sha256) == (told.bytes, told.sha256):
            if (more := path.stat().st_size - told.bytes) > 0:
                self._report.notes.append(
                    f"journal {_name(chunk, told.epoch)} has grown by {more} bytes since the merge: a run that was "
                    "taken for dead has written on; nobody reads that"
                )
            return
        places = [place for place, _is_tail in self._places(path) if place < told.bytes]
        for place in places:
            self._blame(chunk, told.epoch, "the record that begins here is damaged", place)
        if not places:
            self._blame(chunk, told.epoch, "it is not as it was, though every record in it is intact")

    def _check_young(self, chunk: Chunk, epoch: int, path: Path) -> None:
        """A record that is damaged before its chunk is published costs nothing but its line, which is sent again."""
        self._report.checked["bytes"] += (size := path.stat().st_size)
        for place, is_tail in self._places(path):
            if is_tail:
                self._report.notes.append(
                    f"journal {_name(chunk, epoch)} ends in the middle of a record: it is being written, or a run died"
                )
            else:
                self._blame(chunk, epoch, "the record that begins here is damaged", place)
        self._progress(size)

    def _places(self, path: Path) -> Iterator[tuple[int, bool]]:
        with path.open("rb") as journal:
            for number, place in enumerate(damaged_places(journal)):
                if number >= _MOST_PLACES:
                    return
                yield place

    def _blame(self, chunk: Chunk, epoch: int, message: str, offset: int | None = None) -> None:
        mend = rerun_chunk(chunk.batch_id, chunk.index)
        if not chunk.is_published:
            mend = "nothing: the chunk is not published yet, and the line is sent again"
        self._report.add(Problem(Kind.JOURNAL, f"journal/{_name(chunk, epoch)}", message, mend, None, offset))


def _name(chunk: Chunk, epoch: int) -> str:
    return f"{chunk.index:04d}/{epoch:06d}.jsonl"
