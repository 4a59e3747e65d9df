"""Puts the lines of a batch back into the order of its input file. Read by the merge and by its proof.

Within a model's chunks, and within what lenient validation refused, lines already stand in that order: what is left is
a merge of those few streams by the lines' offsets. One line of each is in memory at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from heapq import merge
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO, NamedTuple

from vllm_batch_dagster.core.byteindex import IndexEntry, read_count, read_entries
from vllm_batch_dagster.core.chunking import model_groups
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.lines import hash_custom_id, read_line
from vllm_batch_dagster.core.merging import render_answer, render_rejection, render_unanswered
from vllm_batch_dagster.core.models import Batch, Chunk
from vllm_batch_dagster.core.ports import FileStore, Workspace
from vllm_batch_dagster.core.rejections import Rejection, read_rejections
from vllm_batch_dagster.core.results import SUCCEEDED, UNANSWERED, read_results
from vllm_batch_dagster.stages.healing import dropped_when_damaged
from vllm_batch_dagster.stages.journals import JournalReader

_by_offset = itemgetter(0)


class PlacedLine(NamedTuple):
    """A line of the output (`ok`) or the error file, and where its request begins in the input file."""

    offset: int
    ok: bool
    line: bytes


def ordered_lines(
    batch: Batch, chunks: Sequence[Chunk], files: FileStore, workspace: Workspace
) -> Iterator[PlacedLine]:
    """Yield every line of a batch whose chunks are all published, in the order of the input file.

    Raises CorruptJournal when an answer is damaged; the chunk of a batch that has not ended is then run again.
    """
    if not chunks:
        return
    streams = [
        _group_lines(batch, tuple(group), files, workspace)
        for _model, group in groupby(chunks, key=lambda chunk: chunk.range.model)
    ]
    yield from merge(*streams, _rendered_refusals(batch, workspace), key=_by_offset)


def _group_lines(batch: Batch, chunks: Sequence[Chunk], files: FileStore, workspace: Workspace) -> Iterator[PlacedLine]:
    for chunk in chunks:
        with dropped_when_damaged(batch, chunk, workspace):
            yield from chunk_lines(batch, chunk, files, workspace)


def chunk_lines(batch: Batch, chunk: Chunk, files: FileStore, workspace: Workspace) -> Iterator[PlacedLine]:
    """Yield the lines of a published chunk, in the order of the input file."""
    with ExitStack() as stack:
        index = stack.enter_context(workspace.index_path(batch.id).open("rb"))
        with workspace.result_path(batch.id, chunk.index, chunk.published_epoch).open("rb") as packed:
            results = read_results(packed)
        # The input may be deleted by now; only lines without an answer need it.
        has_gaps = any(entry.outcome == UNANSWERED for entry in results.entries)
        source = stack.enter_context(files.open(batch.input_file_id)) if has_gaps else None
        journals = stack.enter_context(JournalReader(workspace, batch.id, chunk.index))
        entries = read_entries(index, chunk.range.first_line, chunk.range.line_count)
        for line, (entry, result) in enumerate(zip(entries, results.entries, strict=True), chunk.range.first_line):
            if result.outcome == UNANSWERED:
                assert source is not None
                rendered = render_unanswered(batch.id, line, custom_id_at(source, entry), results.reason)
                yield PlacedLine(entry.offset, False, rendered)
            else:
                rendered = render_answer(batch.id, journals.read(result))
                yield PlacedLine(entry.offset, result.outcome == SUCCEEDED, rendered)


def custom_id_at(source: BinaryIO, entry: IndexEntry) -> str:
    """Return the custom_id of the request line at `entry` of the input file."""
    source.seek(entry.offset)
    return read_line(source.read(entry.length)).custom_id


def _rendered_refusals(batch: Batch, workspace: Workspace) -> Iterator[PlacedLine]:
    for rejection in refused_lines(batch, workspace):
        yield PlacedLine(rejection.offset, False, render_rejection(batch.id, rejection))


def refused_lines(batch: Batch, workspace: Workspace) -> Iterator[Rejection]:
    """Yield what lenient validation refused, in the order of the input file."""
    with workspace.index_path(batch.id).open("rb") as index:
        yield from read_rejections(index)


def expected_hashes(batch: Batch, chunks: Sequence[Chunk], workspace: Workspace) -> Iterator[int]:
    """Yield the custom_id hash of every line, in the order of the input file, from the byte index alone.

    Raises StorageFailure when the chunks do not cover the index.
    """
    with ExitStack() as stack:
        first, streams = 0, []
        for _model, lines in model_groups(chunks):
            # A handle each: the streams are read in turns.
            index = stack.enter_context(workspace.index_path(batch.id).open("rb"))
            streams.append((entry.offset, entry.id_hash) for entry in read_entries(index, first, lines))
            first += lines
        _check_cover(batch, workspace, first)
        refused = ((each.offset, hash_custom_id(each.custom_id)) for each in refused_lines(batch, workspace))
        for _offset, id_hash in merge(*streams, refused, key=_by_offset):
            yield id_hash


def _check_cover(batch: Batch, workspace: Workspace, lines: int) -> None:
    with workspace.index_path(batch.id).open("rb") as index:
        indexed = read_count(index)
    if indexed != lines:
        raise StorageFailure(
            f"the chunks of {batch.id} hold {lines} lines, but its byte index {indexed}: materialize validated_input "
            "again"
        )
