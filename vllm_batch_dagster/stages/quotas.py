"""The limits of a project held against the store: bytes for whoever takes files in, queued lines for validation.

Both are read before the write they guard, so calls at the same moment may pass a limit together; the rules are in
core/limits.py.
"""

from vllm_batch_dagster.core.limits import StorageRoom, check_queue
from vllm_batch_dagster.core.models import LineError
from vllm_batch_dagster.core.ports import BatchStore


def find_room(project_id: str, most: int, store: BatchStore, now: float) -> StorageRoom | None:
    """Return what the project may store at this moment; None when there is no limit (`most` 0).

    Parts of uploads take room like files: an upload that is never completed must not be a way around the limit.
    """
    if not most:
        return None
    stored = store.files.stored_bytes(project_id, now) + store.uploads.stored_bytes(project_id)
    return StorageRoom(project_id, stored, most)


def refuse_queue(project_id: str, lines: int, most: int, store: BatchStore) -> LineError | None:
    """Return why a batch of `lines` may not run now, None when it may. `most` 0 = no limit."""
    if not most:
        return None
    open_counts = [batch.counts for batch in store.batches.open() if batch.project_id == project_id]
    queued = sum(max(0, counts.total - counts.completed - counts.failed) for counts in open_counts)
    return check_queue(project_id, queued, lines, most)
