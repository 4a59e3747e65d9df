"""Writes the manifest of what a merge publishes: before the store learns of the files, under the name of the first.

So the files that the store names always have theirs, whoever dies in between, and of two merges each has its own.
Called by stages/merging.py. Reads input, byte index and journals once, a block at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vllm_batch_dagster.core.byteindex import read_count
from vllm_batch_dagster.core.errors import NotFound, StorageFailure
from vllm_batch_dagster.core.manifest import (
    FORMAT,
    ChunkEntry,
    Counts,
    FileDigest,
    JournalDigest,
    Manifest,
    pack_manifest,
    unpack_manifest,
)
from vllm_batch_dagster.core.models import Batch, Chunk, File, RequestCounts
from vllm_batch_dagster.core.ports import BatchStore, FileStore, Workspace
from vllm_batch_dagster.core.provenance import Origin
from vllm_batch_dagster.core.rejections import count_rejections
from vllm_batch_dagster.stages.digests import digest_file
from vllm_batch_dagster.stages.origins import read_origins
from vllm_batch_dagster.stages.publication import publish

SOFTWARE = "vllm-batch-dagster"


def manifest_path(workspace: Workspace, batch_id: str, output_id: str | None, error_id: str | None) -> Path | None:
    """Return where the manifest of these files is; None without files, of which there is none."""
    file_id = output_id or error_id
    return workspace.index_path(batch_id).with_name(f"manifest.{file_id}.json") if file_id else None


def read_manifest(path: Path) -> Manifest:
    """Raises StorageFailure when it is missing or changed."""
    try:
        return unpack_manifest(path.read_bytes())
    except OSError as error:
        raise StorageFailure(f"the manifest {path.name} cannot be read: {error.strerror}") from error


class ManifestWriter:
    """Describes one merge of `batch` and writes it down."""

    def __init__(
        self, batch: Batch, chunks: Sequence[Chunk], store: BatchStore, files: FileStore, workspace: Workspace
    ):
        self._batch, self._chunks = batch, chunks
        self._store, self._files, self._workspace = store, files, workspace
        self._origins: list[Origin] = []

    def write(self, output: File | None, errors: File | None, counts: RequestCounts, now: int) -> Manifest | None:
        """Write the manifest of a merge that has made these files and return it; None without files.

        Raises StorageFailure.
        """
        path = self._path(output, errors)
        if path is None:
            return None
        manifest = self._describe(output, errors, counts, now)
        with publish(path) as file:
            file.write(pack_manifest(manifest))
        return manifest

    def drop_others(self, output: File | None, errors: File | None) -> None:
        """Remove the manifests of earlier merges. Harmless when one cannot be removed."""
        kept = self._path(output, errors)
        for path in self._workspace.index_path(self._batch.id).parent.glob("manifest.*.json"):
            if path != kept:
                with suppress(OSError):
                    path.unlink()

    def _path(self, output: File | None, errors: File | None) -> Path | None:
        ids = (output.id if output else None, errors.id if errors else None)
        return manifest_path(self._workspace, self._batch.id, *ids)

    def _describe(self, output: File | None, errors: File | None, counts: RequestCounts, now: int) -> Manifest:
        index, lines, refused = self._digest_index()
        return Manifest(
            format=FORMAT,
            software=f"{SOFTWARE} {_our_version()}",
            batch=self._batch.id,
            endpoint=self._batch.endpoint,
            created_at=now,
            counts=Counts(counts.total, counts.completed, counts.failed),
            refused=refused,
            chunk_lines=max((chunk.range.line_count for chunk in self._chunks), default=0),
            input=self._digest_input(lines + refused),
            output=_of_record(output, counts.completed),
            errors=_of_record(errors, counts.failed),
            index=index,
            chunks=tuple(self._describe_chunk(chunk) for chunk in self._chunks),
            origins=tuple(self._origins),
        )

    def _digest_index(self) -> tuple[FileDigest, int, int]:
        with self._workspace.index_path(self._batch.id).open("rb") as index:
            digest = digest_file("index.bin", index, with_blocks=True)
            return digest, read_count(index), count_rejections(index)

    def _digest_input(self, lines: int) -> FileDigest | None:
        """Return the digest of the upload, as the store has it; None when its owner has deleted it meanwhile."""
        try:
            record = self._store.files.get(self._batch.input_file_id)
            with self._files.open(record.id) as source:
                blocks = digest_file(record.id, source, with_blocks=True).blocks
        except NotFound:
            return None
        return FileDigest(record.id, record.bytes, record.sha256, lines, blocks)

    def _describe_chunk(self, chunk: Chunk) -> ChunkEntry:
        assert chunk.summary is not None
        path = self._workspace.result_path(self._batch.id, chunk.index, chunk.published_epoch)
        with path.open("rb") as result:
            digest = digest_file(f"results/{path.name}", result)
        journals = tuple(self._digest_journals(chunk))
        return ChunkEntry(
            index=chunk.index,
            model=chunk.range.model or self._batch.model,
            first_line=chunk.range.first_line,
            lines=chunk.range.line_count,
            epoch=chunk.published_epoch,
            completed=chunk.summary.counts.completed,
            failed=chunk.summary.counts.failed,
            answers=chunk.summary.digest,
            result=digest,
            journals=journals,
            origins=tuple(self._places(chunk, journals)),
        )

    def _digest_journals(self, chunk: Chunk) -> Iterator[JournalDigest]:
        for epoch in range(1, chunk.published_epoch + 1):
            path = self._workspace.journal_path(self._batch.id, chunk.index, epoch)
            if path.exists():
                with path.open("rb") as journal:
                    digest = digest_file(path.name, journal)
                yield JournalDigest(epoch, digest.bytes, digest.sha256)

    def _places(self, chunk: Chunk, journals: Sequence[JournalDigest]) -> Iterator[int | None]:
        """Yield where in the manifest's list the engines are that have answered lines of the chunk."""
        found: dict[int | None, None] = {}
        for journal in journals:
            if journal.bytes:
                noted = read_origins(self._workspace, self._batch.id, chunk.index, journal.epoch)
                places: list[int | None] = [self._place(origin) for origin in noted]
                found.update(dict.fromkeys(places or [None]))
        yield from found

    def _place(self, origin: Origin) -> int:
        if origin not in self._origins:
            self._origins.append(origin)
        return self._origins.index(origin)


def _of_record(file: File | None, lines: int) -> FileDigest | None:
    return FileDigest(file.id, file.bytes, file.sha256, lines) if file else None


def _our_version() -> str:
    try:
        return version(SOFTWARE)
    except PackageNotFoundError:
        return "unknown"
