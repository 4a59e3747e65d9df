"""Merges the published chunks of a batch into its output and error file, in input order, and ends the batch.

Called by the `merged_output` asset: after the last chunk, after a rerun of one, and when a batch is cancelled or
expires (then lines without an answer go to the error file with that reason). Streams: one line in memory at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from vllm_batch_dagster.core.errors import BatchError, StateConflict, StorageFailure, UnprovenMerge
from vllm_batch_dagster.core.histogram import Buckets, Histogram
from vllm_batch_dagster.core.manifest import Manifest
from vllm_batch_dagster.core.merging import (
    Tally,
    covered_seconds,
    reconcile_files,
)
from vllm_batch_dagster.core.models import (
    DEFAULT_FILE_LIFETIME_SECONDS,
    OUTPUT_PURPOSE,
    Batch,
    Chunk,
    File,
    RequestCounts,
    StopReason,
    Usage,
    stop_reason,
)
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore, StoredFile, Workspace
from vllm_batch_dagster.core.rejections import count_rejections
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.failpoints import failpoint
from vllm_batch_dagster.stages.attempts import ChunkAttempt
from vllm_batch_dagster.stages.healing import without_lost_results
from vllm_batch_dagster.stages.input_order import chunk_lines, expected_hashes, ordered_lines
from vllm_batch_dagster.stages.intake import discard_unregistered
from vllm_batch_dagster.stages.manifests import ManifestWriter
from vllm_batch_dagster.stages.repairing import add_repairs

_ENDINGS = {
    None: BatchEvent.PUBLISHED,
    StopReason.CANCELLED: BatchEvent.STOPPED,
    StopReason.EXPIRED: BatchEvent.DEADLINE,
}


@dataclass(frozen=True, slots=True)
class MergePorts:
    """What a merge needs from the outside world. `new_id` makes a file id."""

    store: BatchStore
    files: FileStore
    workspace: Workspace
    clock: Clock
    new_id: Callable[[], str]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote. `tally` is the proof that every input line stands exactly once. `sealed` are the chunks that
    it published itself because the batch stops; `inference_seconds` the time in which any chunk was at work."""

    batch: Batch
    output: File | None
    errors: File | None
    counts: RequestCounts
    usage: Usage
    tally: Tally
    inference_seconds: float
    finish_reasons: dict[str, int]
    output_lengths: Buckets
    sealed: Sequence[int] = ()
    manifest: Manifest | None = None


def merge_batch(batch: Batch, ports: MergePorts, *, run_id: str) -> MergeReport:
    """Write the files of `batch`, prove them against the byte index, register them and move the batch on.

    Raises StateConflict when a chunk has no result yet and the batch is not stopping, UnprovenMerge when the proof
    fails (then nothing is registered). Safe to repeat: every merge makes new files, the last one counts.
    """
    stopping = stop_reason(batch, ports.clock())
    sealed = _seal_rest(batch, ports, stopping, run_id) if stopping else []
    # Read before the chunks: a result published meanwhile must leave the batch stale, not look merged.
    version = ports.store.batches.get(batch.id).result_version
    chunks = without_lost_results(ports.store.chunks.list(batch.id), ports.workspace)
    if missing := [chunk.index for chunk in chunks if not chunk.is_published]:
        raise StateConflict(f"chunks {missing} of {batch.id} have no result yet: materialize chunk_results for them")
    batch = _enter(batch, ports, stopping)
    failpoint("finalizing", batch.id)
    output, errors = _write_files(batch, chunks, ports)
    files = tuple(filter(None, (output, errors)))
    with _deleted_on_error(ports, files):
        failpoint("merged", batch.id)
        tally = _prove(batch, chunks, output, errors, ports)
        counts, usage = _add_up(chunks, _count_refused(batch, chunks, ports))
        changes = {"counts": counts, "usage": usage, "merged_version": version, "repairs": add_repairs(batch, chunks)}
        changes |= {
            "output_file_id": output.id if output else None,
            "error_file_id": errors.id if errors else None,
        }
        writer = ManifestWriter(batch, chunks, ports.store, ports.files, ports.workspace)
        manifest = writer.write(output, errors, counts, int(ports.clock()))
        batch = _leave(batch, ports, stopping, files, changes)
        writer.drop_others(output, errors)
    failpoint("ended", batch.id)
    report = _report(batch, chunks, output, errors, counts, usage, tally, sealed)
    return replace(report, manifest=manifest)


@contextmanager
def _deleted_on_error(ports: MergePorts, files: Sequence[File]) -> Iterator[None]:
    """Delete the contents of `files` when they could not be registered, so that nothing is left without an owner.

    A store that fails may have committed before its reply was lost: it is asked first, and if it cannot say, they stay.
    """
    try:
        yield
    except BatchError:
        for file in files:
            with suppress(StorageFailure):
                discard_unregistered(file.id, ports.store, ports.files)
        raise


def _count_refused(batch: Batch, chunks: Sequence[Chunk], ports: MergePorts) -> int:
    """Count the lines that lenient validation refused. The index knows them also when validation was cut short."""
    if not chunks:
        return 0
    with ports.workspace.index_path(batch.id).open("rb") as index:
        return count_rejections(index)


def _add_up(chunks: Sequence[Chunk], refused: int) -> tuple[RequestCounts, Usage]:
    counts, usage = RequestCounts(total=refused, failed=refused), Usage()
    for chunk in chunks:
        assert chunk.summary is not None
        counts, usage = counts + chunk.summary.counts, usage + chunk.summary.usage
    return counts, usage


def _enter(batch: Batch, ports: MergePorts, stopping: StopReason | None) -> Batch:
    if batch.status is BatchStatus.IN_PROGRESS and stopping is None:
        return ports.store.batches.advance(batch.id, BatchEvent.MERGE, int(ports.clock()))
    if batch.status is BatchStatus.FAILED:
        raise StateConflict(f"{batch.id} did not pass validation: there is nothing to merge")
    return batch


def _seal_rest(batch: Batch, ports: MergePorts, stopping: StopReason, run_id: str) -> list[int]:
    """Publish the chunks that a stopping batch leaves unfinished, as far as their journals go; return their indexes."""
    sealed: list[int] = []
    for chunk in without_lost_results(ports.store.chunks.list(batch.id), ports.workspace):
        if not chunk.is_published:
            attempt = ChunkAttempt.begin(
                ports.store,
                ports.files,
                ports.workspace,
                batch,
                chunk,
                fresh=False,
                run_id=run_id,
                clock=ports.clock,
            )
            attempt.close()
            attempt.publish(reason=stopping.value)
            sealed.append(chunk.index)
    return sealed


def _write_files(batch: Batch, chunks: Sequence[Chunk], ports: MergePorts) -> tuple[File | None, File | None]:
    with ExitStack() as stack:
        output = stack.enter_context(_Sheet(ports, batch, "output"))
        errors = stack.enter_context(_Sheet(ports, batch, "errors"))
        for _offset, ok, line in ordered_lines(batch, chunks, ports.files, ports.workspace):
            (output if ok else errors).write(line)
            failpoint("merging", batch.id)
        return output.finish(), errors.finish()


class _Sheet:
    """One of the two files while it is written. It exists only if it has a line (contract D.3)."""

    def __init__(self, ports: MergePorts, batch: Batch, kind: str) -> None:
        self._ports, self._batch, self._kind = ports, batch, kind
        self._id = ports.new_id()
        self._stored: StoredFile | None = None

    def __enter__(self) -> "_Sheet":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._stored is not None:
            self._stored.discard()
            if kind is not None:  # it may be finished already, and the other one was refused
                self._ports.files.delete(self._id)

    def write(self, line: bytes) -> None:
        if self._stored is None:
            self._stored = self._ports.files.create(self._id)
        self._stored.write(line)

    def finish(self) -> File | None:
        if self._stored is None:
            return None
        size, digest = self._stored.commit()
        now = int(self._ports.clock())
        lifetime = self._batch.output_expires_after or DEFAULT_FILE_LIFETIME_SECONDS
        name = f"{self._batch.id}_{self._kind}.jsonl"
        expires_at = now + lifetime
        return File(self._id, size, now, name, OUTPUT_PURPOSE, digest, expires_at, self._batch.project_id)


def merged_lines(batch: Batch, chunk: Chunk, files: FileStore, workspace: Workspace) -> Iterator[tuple[bool, bytes]]:
    """Yield (belongs to the output file, rendered line) for each line of a published chunk, in input order."""
    for _offset, ok, line in chunk_lines(batch, chunk, files, workspace):
        yield ok, line


def _prove(batch: Batch, chunks: Sequence[Chunk], output: File | None, errors: File | None, ports: MergePorts) -> Tally:
    """Read both files back and walk them beside the byte index. Raises UnprovenMerge when a line is not there once."""
    with ExitStack() as stack:
        sheets = [stack.enter_context(ports.files.open(file.id)) if file else () for file in (output, errors)]
        if not chunks:
            return Tally()
        tally = reconcile_files(expected_hashes(batch, chunks, ports.workspace), *sheets)
    if tally.problem:
        raise UnprovenMerge(batch.id, tally.problem)
    return tally


def _leave(
    batch: Batch,
    ports: MergePorts,
    stopping: StopReason | None,
    files: Sequence[File],
    changes: dict[str, Any],
) -> Batch:
    """Register the files and end the batch in one transaction, or replace the files of one that has ended."""
    if batch.is_terminal:
        return ports.store.batches.amend(batch.id, files=files, **changes)
    return ports.store.batches.advance(batch.id, _ENDINGS[stopping], int(ports.clock()), files=files, **changes)


def _report(
    batch: Batch,
    chunks: Sequence[Chunk],
    output: File | None,
    errors: File | None,
    counts: RequestCounts,
    usage: Usage,
    tally: Tally,
    sealed: Sequence[int],
) -> MergeReport:
    lengths, reasons = Histogram(), dict[str, int]()
    spans: list[tuple[float, float]] = []
    for chunk in chunks:
        assert chunk.summary is not None
        lengths.merge(chunk.summary.output_lengths)
        spans.append((chunk.summary.first_sent_at, chunk.summary.last_answer_at))
        for reason, count in chunk.summary.finish_reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    seconds = covered_seconds(spans)
    return MergeReport(batch, output, errors, counts, usage, tally, seconds, reasons, lengths.buckets(), sealed)
