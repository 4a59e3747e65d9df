"""Reads the answered lines of a published chunk together with their requests: for curation and for samples."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from vllm_batch_dagster.core.byteindex import read_entries
from vllm_batch_dagster.core.journal import JournalRecord
from vllm_batch_dagster.core.lines import read_request
from vllm_batch_dagster.core.models import Batch, Chunk
from vllm_batch_dagster.core.ports import FileStore, Workspace
from vllm_batch_dagster.core.results import UNANSWERED, read_results
from vllm_batch_dagster.stages.journals import JournalReader


@dataclass(frozen=True, slots=True)
class AnsweredLine:
    """A request's body as the user sent it, and the record of its answer."""

    request: bytes
    record: JournalRecord


def answered_lines(
    batch: Batch, chunk: Chunk, files: FileStore, workspace: Workspace, most: int | None = None
) -> Iterator[AnsweredLine]:
    """Yield the answered lines of a published chunk in input order, at most `most` of them."""
    left = chunk.range.line_count if most is None else most
    with ExitStack() as stack:
        index = stack.enter_context(workspace.index_path(batch.id).open("rb"))
        source = stack.enter_context(files.open(batch.input_file_id))
        with workspace.result_path(batch.id, chunk.index, chunk.published_epoch).open("rb") as packed:
            results = read_results(packed)
        journals = stack.enter_context(JournalReader(workspace, batch.id, chunk.index))
        lines = read_entries(index, chunk.range.first_line, chunk.range.line_count)
        for entry, result in zip(lines, results.entries, strict=True):
            if left > 0 and result.outcome != UNANSWERED:
                left -= 1
                source.seek(entry.offset)
                request = read_request(source.read(entry.length))[1]
                yield AnsweredLine(request, journals.read(result))
