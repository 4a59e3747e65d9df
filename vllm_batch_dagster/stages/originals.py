"""Finds the requests behind reviewed answers: the lines of a few custom_ids, by the byte index of the input file.

Called by stages/pulling.py, so that a review keeps its request when the batch has gone.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress

import msgspec

from vllm_batch_dagster.core.byteindex import read_count, read_entries
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.lines import hash_custom_id, read_request
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import BatchStore, FileStore, Workspace
from vllm_batch_dagster.core.reviewed import Asked


def find_requests(
    batch_id: str, custom_ids: Collection[str], store: BatchStore, files: FileStore, workspace: Workspace
) -> Mapping[str, Asked]:
    """Return what is known of the requests of `custom_ids`: of a batch whose data has gone, only project and endpoint;
    nothing of one that nobody knows."""
    try:
        batch = store.batches.get(batch_id)
    except NotFound:
        return {}
    found = dict.fromkeys(custom_ids, Asked(batch.project_id, endpoint=batch.endpoint))
    with suppress(NotFound, FileNotFoundError):
        found.update(_find(batch, custom_ids, files, workspace))
    return found


def _find(
    batch: Batch, custom_ids: Collection[str], files: FileStore, workspace: Workspace
) -> Iterator[tuple[str, Asked]]:
    wanted = {hash_custom_id(each) for each in custom_ids}
    with ExitStack() as stack:
        index = stack.enter_context(workspace.index_path(batch.id).open("rb"))
        source = stack.enter_context(files.open(batch.input_file_id))
        entries = enumerate(read_entries(index, 0, read_count(index)))
        for line, entry in [(line, entry) for line, entry in entries if entry.id_hash in wanted]:
            source.seek(entry.offset)
            custom_id, body = read_request(source.read(entry.length))
            if custom_id in custom_ids:
                yield custom_id, Asked(batch.project_id, line, batch.endpoint, _as_text(body))


def _as_text(body: bytes) -> str:
    """Return the body, or nothing for one that Python cannot hold (1e999): it could not be asked again."""
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return ""
    return body.decode()
