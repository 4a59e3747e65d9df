"""Notes beside each journal which engine gave its answers. Written while a chunk runs, read for the manifest.

    journal/<chunk>/<epoch>.origins.json    a JSON list of the engines that the attempt has met, usually one

A note never costs an answer: it is taken on a thread of its own, and one that fails is only missing in the manifest.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from vllm_batch_dagster.core.errors import BatchError
from vllm_batch_dagster.core.ports import Workspace
from vllm_batch_dagster.core.provenance import Origin
from vllm_batch_dagster.stages.publication import publish

_decoder = msgspec.json.Decoder(list[Origin])


def origins_path(workspace: Workspace, batch_id: str, chunk: int, epoch: int) -> Path:
    """Return where the note of an attempt is."""
    return workspace.journal_path(batch_id, chunk, epoch).with_suffix(".origins.json")


def read_origins(workspace: Workspace, batch_id: str, chunk: int, epoch: int) -> Sequence[Origin]:
    """Return the engines that an attempt has met, none when there is no note."""
    try:
        return _decoder.decode(origins_path(workspace, batch_id, chunk, epoch).read_bytes())
    except (OSError, msgspec.DecodeError):
        return ()


class OriginNotes:
    """Takes the notes of one run. `describe` tells what answers at this moment, and may take seconds.

    `note` returns at once; leaving the block waits for what is still to be written.
    """

    def __init__(self, workspace: Workspace, describe: Callable[[], Origin]) -> None:
        self._workspace, self._describe = workspace, describe
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="origins")

    def note(self, batch_id: str, chunk: int, epoch: int) -> None:
        """Note the engine of now for an attempt: once when it begins, and once at its end, for it may be another."""
        self._writer.submit(self._write, batch_id, chunk, epoch)

    def __enter__(self) -> "OriginNotes":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()

    def _write(self, batch_id: str, chunk: int, epoch: int) -> None:
        try:
            origin = self._describe()
            known = read_origins(self._workspace, batch_id, chunk, epoch)
            # An engine that is gone by now tells no version: the first note has it.
            if origin not in known and (origin.engine.versions or not known):
                with publish(origins_path(self._workspace, batch_id, chunk, epoch)) as note:
                    note.write(msgspec.json.encode([*known, origin]))
        except (BatchError, OSError):
            return  # the manifest will say that it is not known
