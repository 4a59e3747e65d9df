"""How the push of a batch's selected rows went, kept beside them: what the schedule needs to catch up on failed ones.

A file and no table: it belongs to the selection, is replaced and deleted with it, and nobody else asks for it.
"""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import msgspec

from vllm_batch_dagster.core.ports import Workspace
from vllm_batch_dagster.stages.curation import REVIEW
from vllm_batch_dagster.stages.publication import sync_folder

_FILE = "push.json"
_PREFIX = "batch="
_DRAFT = ".new"


class PushState(StrEnum):
    """`off`: no Label Studio was set then, and one that is set later does not get old batches by itself."""

    OFF = "off"
    FAILED = "failed"
    DONE = "done"


class PushRecord(msgspec.Struct, frozen=True):
    """`at` in unix seconds; `reason` of a failure; `url` of the project."""

    state: PushState
    at: float
    reason: str = ""
    url: str = ""


def write_push(folder: Path, record: PushRecord) -> None:
    """Put the record beside the rows. A selection without one was cut before its push, and counts as failed."""
    draft = folder / f"{_FILE}.partial"
    draft.write_bytes(msgspec.json.encode(record))
    draft.replace(folder / _FILE)
    sync_folder(folder / _FILE)
    sync_folder(folder)


def read_push(folder: Path) -> PushRecord | None:
    try:
        return msgspec.json.decode((folder / _FILE).read_bytes(), type=PushRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def failed_pushes(workspace: Workspace) -> Iterator[str]:
    """Yield the batches whose selection has not reached Label Studio, oldest selection first."""
    folders = sorted(workspace.dataset_path(REVIEW, "any").parent.glob(f"{_PREFIX}*"), key=_time)
    for folder in folders:
        record = None if folder.name.endswith(_DRAFT) else read_push(folder)
        if not folder.name.endswith(_DRAFT) and (record is None or record.state is PushState.FAILED):
            yield folder.name.removeprefix(_PREFIX)


def _time(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0
