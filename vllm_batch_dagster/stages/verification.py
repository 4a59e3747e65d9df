"""Checks from disk that a batch is what it was: every digest, every count, every line exactly once and in its place.

Called by `vllm-batch verify`. Reads only, and may run beside anything: what is not published yet is checked as far as
it goes, and a batch that a run changes meanwhile is looked at again. Memory does not follow the number of lines.

    manifest -> input file, byte index -> result indexes and journals, line by line -> output and error file
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from vllm_batch_dagster.core.errors import NotFound, StorageFailure
from vllm_batch_dagster.core.manifest import Manifest
from vllm_batch_dagster.core.models import Batch, Chunk, File, RequestCounts
from vllm_batch_dagster.core.ports import BatchStore, FileStore, Workspace
from vllm_batch_dagster.core.verification import Kind, Problem, VerifyReport, merge_again
from vllm_batch_dagster.stages.digests import Progress, digest_file, ignore_progress
from vllm_batch_dagster.stages.manifests import manifest_path, read_manifest
from vllm_batch_dagster.stages.verified_chunks import PublishedChunk, published_chunks
from vllm_batch_dagster.stages.verified_files import SourceCheck
from vllm_batch_dagster.stages.verified_journals import JournalCheck, journal_paths
from vllm_batch_dagster.stages.verified_output import MergedFile, compare_files, expected_lines

_LOOKS = 3
_RESTORE = "put the file back from a copy"


@dataclass(frozen=True, slots=True)
class VerifyPorts:
    """What a verification needs from the outside world. `start` is called with the bytes that will be read, `progress`
    with those that were."""

    store: BatchStore
    files: FileStore
    workspace: Workspace
    start: Callable[[int], None] = ignore_progress
    progress: Progress = ignore_progress


def verify_batch(batch_id: str, ports: VerifyPorts) -> VerifyReport:
    """Check a batch. Raises NotFound for one that does not exist, StorageFailure when the store cannot be used.

    Problems of a batch that has changed meanwhile (a merge, a chunk that was run again) may come from that alone: then
    it is looked at again.
    """
    for look in range(_LOOKS):
        batch, chunks = ports.store.batches.get(batch_id), ports.store.chunks.list(batch_id)
        report = _Verification(batch, chunks, ports).run()
        is_still = _state(batch, chunks) == _state(ports.store.batches.get(batch_id), ports.store.chunks.list(batch_id))
        if report.is_good or is_still or look == _LOOKS - 1:
            break
    if not is_still:
        report.notes.append("the batch went on while it was checked: verify it again when it has ended")
    return report


def _state(batch: Batch, chunks: Sequence[Chunk]) -> object:
    files = (batch.status, batch.output_file_id, batch.error_file_id, batch.purged_at)
    return files, [(chunk.epoch, chunk.published_epoch) for chunk in chunks]


class _Verification:
    """One look at a batch."""

    def __init__(self, batch: Batch, chunks: Sequence[Chunk], ports: VerifyPorts) -> None:
        self._batch, self._chunks, self._ports = batch, chunks, ports
        self._report = VerifyReport(batch.id, batch.status.value)
        self._report.is_published = bool(batch.output_file_id or batch.error_file_id)

    def run(self) -> VerifyReport:
        if self._batch.purged_at is not None:
            self._report.notes.append("its journals are gone (retention): only the files themselves are checked")
            self._check_digests()
            return self._report
        manifest = self._read_manifest()
        self._ports.start(self._bytes_to_read())
        self._check_sources(manifest)
        published = list(published_chunks(self._chunks, manifest.chunks if manifest else (), self._report))
        self._check_lines(published)
        journals = JournalCheck(
            self._ports.workspace, manifest.chunks if manifest else (), self._report, self._ports.progress
        )
        for chunk in self._chunks:
            journals.check(chunk)
        if manifest:
            self._compare_counts(manifest)
        if len(published) < len(self._chunks):
            self._report.notes.append(f"{len(published)} of {len(self._chunks)} chunks are published so far")
        return self._report

    def _read_manifest(self) -> Manifest | None:
        path = manifest_path(
            self._ports.workspace, self._batch.id, self._batch.output_file_id, self._batch.error_file_id
        )
        if path is None:
            return None
        try:
            return read_manifest(path)
        except StorageFailure as error:
            self._report.add(Problem(Kind.MANIFEST, path.name, str(error), merge_again(self._batch.id)))
            return None

    def _bytes_to_read(self) -> int:
        journals = sum(
            path.stat().st_size
            for chunk in self._chunks
            for _epoch, path in journal_paths(self._ports.workspace, chunk)
        )
        ids = (self._batch.input_file_id, self._batch.output_file_id, self._batch.error_file_id)
        return journals + sum(record.bytes for record in map(self._record, ids) if record)

    def _record(self, file_id: str | None) -> File | None:
        try:
            return self._ports.store.files.get(file_id) if file_id else None
        except NotFound:
            return None

    def _check_sources(self, manifest: Manifest | None) -> None:
        ports = self._ports
        stores = (ports.store, ports.files, ports.workspace)
        check = SourceCheck(self._batch, manifest, *stores, self._report, ports.progress)
        check.check(has_index=bool(self._chunks))

    def _check_lines(self, published: Sequence[PublishedChunk]) -> None:
        """Walk all answers, beside the merged files when there are any."""
        if self._report.has(Kind.INDEX) or len(published) < len(self._chunks):
            # Without a sound index the order is not known: what there is stands for itself.
            self._check_digests()
        if self._report.has(Kind.INDEX) or not self._chunks:
            return
        is_whole = len(published) == len(self._chunks)
        with ExitStack() as stack:
            output = self._open(stack, Kind.OUTPUT, self._batch.output_file_id) if is_whole else None
            errors = self._open(stack, Kind.ERRORS, self._batch.error_file_id) if is_whole else None
            stores = (self._ports.files, self._ports.workspace)
            homeless = compare_files(expected_lines(self._batch, published, *stores, self._report), output, errors)
        if homeless and is_whole and self._report.is_published and not self._report.has(Kind.OUTPUT, Kind.ERRORS):
            message = f"{homeless} lines stand in neither the output nor the error file"
            self._report.add(Problem(Kind.OUTPUT, self._batch.id, message, merge_again(self._batch.id)))

    def _open(self, stack: ExitStack, kind: Kind, file_id: str | None) -> MergedFile | None:
        if file_id is None:
            return None
        record = self._record(file_id)
        if record is None:
            self._report.notes.append(f"the {kind.value} file {file_id} was deleted; it is not checked")
            return None
        try:
            content = stack.enter_context(self._ports.files.open(file_id))
        except NotFound:
            message = "the contents of the file are gone"
            self._report.add(Problem(kind, file_id, message, merge_again(self._batch.id)))
            return None
        return MergedFile(kind, self._batch.id, record, content, self._report, self._ports.progress)

    def _check_digests(self) -> None:
        """Check the merged files by nothing but the digests that the store has."""
        ids = ((Kind.OUTPUT, self._batch.output_file_id), (Kind.ERRORS, self._batch.error_file_id))
        for kind, file_id in ids:
            record = self._record(file_id)
            if record is None:
                continue
            try:
                with self._ports.files.open(record.id) as content:
                    found = digest_file(record.id, content, progress=self._ports.progress)
            except NotFound:
                self._report.add(Problem(kind, record.id, "the contents of the file are gone", _RESTORE))
                continue
            self._report.checked["bytes"] += found.bytes
            if (found.bytes, found.sha256) != (record.bytes, record.sha256):
                message = f"the file is not as published: sha256 {found.sha256}, not {record.sha256}"
                self._report.add(Problem(kind, record.id, message, _RESTORE))

    def _compare_counts(self, manifest: Manifest) -> None:
        counts = RequestCounts(manifest.counts.total, manifest.counts.completed, manifest.counts.failed)
        lines = sum(entry.lines for entry in manifest.chunks) + manifest.refused
        written = [digest.lines or 0 for digest in (manifest.output, manifest.errors) if digest]
        told = {
            "its chunks": lines,
            "its files": sum(written),
            "completed and failed": counts.completed + counts.failed,
        }
        wrong = [f"{name} make {number}" for name, number in told.items() if number != counts.total]
        if self._batch.counts != counts and not self._batch.is_stale:
            wrong.append(f"the batch says {self._batch.counts.completed} + {self._batch.counts.failed}")
        for digest in filter(None, (manifest.output, manifest.errors)):
            record = self._record(digest.name)
            if record and (record.bytes, record.sha256) != (digest.bytes, digest.sha256):
                wrong.append(f"the store has another digest of {digest.name}")
        if wrong:
            message = f"the manifest tells {counts.total} lines, but " + ", ".join(wrong)
            self._report.add(Problem(Kind.RECORD, self._batch.id, message, merge_again(self._batch.id)))
