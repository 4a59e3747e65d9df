"""Makes a new batch of the lines of a finished batch that have no good answer: failed, expired, cancelled.

Called by POST /v1/batches/{id}/retry. The lines are copied from their byte ranges of the original input into a new
file, one at a time; the new batch names its parent in the metadata.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import chain

from vllm_batch_dagster.core.byteindex import read_entries
from vllm_batch_dagster.core.claims import Claim, ClaimKey, claim_batch
from vllm_batch_dagster.core.creation import (
    MAX_METADATA_PAIRS,
    FileFacts,
    Randomness,
    make_batch,
    new_batch_id,
    read_batch_params,
    read_metadata,
)
from vllm_batch_dagster.core.errors import BatchError, InvalidInput, StateConflict, StorageFailure
from vllm_batch_dagster.core.limits import StorageRoom
from vllm_batch_dagster.core.models import Batch, Chunk
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore, Workspace
from vllm_batch_dagster.core.results import SUCCEEDED, read_results
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.core.webhook_params import check_batch_webhook
from vllm_batch_dagster.core.webhook_urls import NO_HOSTS, AllowedHosts
from vllm_batch_dagster.core.windows import WindowRule
from vllm_batch_dagster.stages.intake import FileReceipt, delete_file, find_file

RETRY_OF = "retry_of"
NOTHING_TO_RETRY = "nothing_to_retry"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RetryPorts:
    """What a retry needs from the outside world. `room` is what the project may still store, None: no limit."""

    store: BatchStore
    files: FileStore
    workspace: Workspace
    clock: Clock
    randomness: Randomness
    windows: WindowRule = WindowRule.OPENAI
    room: StorageRoom | None = None
    webhook_hosts: AllowedHosts = NO_HOSTS


def retry_batch(
    batch: Batch,
    params: Mapping[str, object],
    ports: RetryPorts,
    *,
    claim_key: ClaimKey | None = None,
    on_repeat: Callable[[], None] = lambda: None,
) -> Batch:
    """Return a new batch of the lines of `batch` that did not succeed. `params` may give completion_window, metadata.
    When `claim_key` has made one before, that one is returned, and `on_repeat` called.

    Raises StateConflict while the batch is open, InvalidInput when there is nothing to retry or a parameter is wrong,
    NotFound("file") when the input is gone, ClaimConflict.
    """
    _refuse_open(batch)
    claim = claim_batch(claim_key, {"retry": batch.id, **params}) if claim_key else None
    if claim and (known := ports.store.idempotency.find(claim, ports.clock())):
        on_repeat()
        return ports.store.batches.get(known)
    checked = read_batch_params(make_params(batch, params), ports.windows)
    check_batch_webhook(checked.metadata, ports.webhook_hosts)
    blocks = _blocks(_failed_lines(batch, ports))
    first = next(blocks, None)
    if first is None:
        raise _nothing(batch)
    checked = replace(checked, input_file_id=_store_input(batch, chain((first,), blocks), ports))
    made = make_batch(checked, new_batch_id(ports.randomness), int(ports.clock()), batch.project_id)
    if (kept := _record(made, claim, ports)) == made.id:
        return made
    on_repeat()
    return ports.store.batches.get(kept)


def _refuse_open(batch: Batch) -> None:
    if not batch.is_terminal:
        raise StateConflict(
            f"Batch {batch.id} is '{batch.status.value}': it can be retried when it has ended. Wait, or cancel it."
        )


def _record(made: Batch, claim: Claim | None, ports: RetryPorts) -> str:
    """Store the new batch. Returns its id, or that of the batch that a call at the same moment made first."""
    try:
        kept = ports.store.batches.add(made, claim=claim)
    except BatchError:
        _forget(made.input_file_id, ports)
        raise
    if kept != made.id:
        _forget(made.input_file_id, ports)
    return kept


def _forget(file_id: str, ports: RetryPorts) -> None:
    """Delete the new input file. It stays when an open batch reads it: a store that fails may have committed."""
    with suppress(BatchError):
        delete_file(file_id, ports.store, ports.files, ports.clock())


def make_params(batch: Batch, params: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters of the new batch: those of `batch`, but for what `params` says. Raises InvalidInput."""
    metadata = dict(read_metadata(params.get("metadata", batch.metadata)) or {}) | {RETRY_OF: batch.id}
    if len(metadata) > MAX_METADATA_PAIRS:
        raise InvalidInput(
            f"The metadata has no room for '{RETRY_OF}': a batch takes {MAX_METADATA_PAIRS} pairs. Send 'metadata' "
            f"with at most {MAX_METADATA_PAIRS - 1}.",
            param="metadata",
            code="object_above_max_properties",
        )
    wanted: dict[str, object] = {
        "input_file_id": batch.input_file_id,
        "endpoint": batch.endpoint,
        "completion_window": params.get("completion_window", batch.completion_window),
        "metadata": metadata,
    }
    if batch.output_expires_after is not None:
        wanted["output_expires_after"] = {"anchor": "created_at", "seconds": batch.output_expires_after}
    return wanted


def _nothing(batch: Batch) -> InvalidInput:
    reason = f"every request of batch {batch.id} has succeeded"
    if batch.status is BatchStatus.FAILED:
        reason = f"the input of batch {batch.id} did not pass validation. Mend the lines that its 'errors' name"
    elif batch.rejected:
        reason = f"the other lines of batch {batch.id} did not pass validation. Mend them and upload them"
    return InvalidInput(f"There is nothing to retry: {reason}.", code=NOTHING_TO_RETRY)


def _store_input(batch: Batch, blocks: Iterator[bytes], ports: RetryPorts) -> str:
    receipt = FileReceipt(ports.files, ports.randomness, room=ports.room)
    try:
        for block in blocks:
            receipt.write(block)
        facts = FileFacts(f"{batch.id}_retry.jsonl", "batch", project_id=batch.project_id)
        return receipt.finish(facts, ports.store, ports.clock).id
    except BaseException:
        receipt.abandon()
        raise


def _failed_lines(batch: Batch, ports: RetryPorts) -> Iterator[bytes]:
    """Yield the lines without a good answer, newline included. Raises NotFound("file") for a missing input."""
    if batch.status is BatchStatus.FAILED:
        return
    record = find_file(batch.input_file_id, ports.store, ports.clock(), batch.project_id)
    chunks = ports.store.chunks.list(batch.id)
    with ExitStack() as stack:
        source = stack.enter_context(ports.files.open(record.id))
        if not chunks:  # stopped before it was validated: no line of it has run
            yield from iter(lambda: source.read(_BLOCK_BYTES), b"")
            return
        index = stack.enter_context(ports.workspace.index_path(batch.id).open("rb"))
        for chunk in chunks:
            outcomes = _outcomes(chunk, ports.workspace)
            lines = read_entries(index, chunk.range.first_line, chunk.range.line_count)
            for entry, outcome in zip(lines, outcomes, strict=True):
                if outcome != SUCCEEDED:
                    source.seek(entry.offset)
                    yield source.read(entry.length) + b"\n"


def _outcomes(chunk: Chunk, workspace: Workspace) -> Iterator[int]:
    if not chunk.is_published:
        raise StorageFailure(f"chunk {chunk.index} of {chunk.batch_id} has no result: materialize merged_output again")
    with workspace.result_path(chunk.batch_id, chunk.index, chunk.published_epoch).open("rb") as packed:
        results = read_results(packed)
    return (entry.outcome for entry in results.entries)


def _blocks(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Join lines to writes of a megabyte or a little more."""
    block = bytearray()
    for line in lines:
        block += line
        if len(block) >= _BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)
