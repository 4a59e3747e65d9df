"""What the inbox needs of a folder. Implemented by adapters/drop_folder.py."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from vllm_batch_dagster.core.inbox import Verdict


class Drop(Protocol):
    """A dropped file that is ours: nobody else takes it, and it stays so until `finish`."""

    @property
    def id(self) -> str:
        """Its name among all drops, ever."""

    @property
    def filename(self) -> str:
        """The name under which it was dropped."""

    def open(self) -> BinaryIO:
        """Raises StorageFailure."""

    def read_order(self) -> object:
        """Return the YAML document beside the file, None without one. Raises InvalidInput when it is no YAML."""

    def finish(self, verdict: Verdict, report: str) -> None:
        """Put the file, its order and the report together where people look for them. Raises StorageFailure."""


class DropFolder(Protocol):
    """A folder into which people and programs drop files."""

    def alone(self) -> AbstractContextManager[bool]:
        """Hold the folder against other processes; yields False when another one holds it."""

    def waiting(self) -> Iterator[str]:
        """Yield the names of the dropped files that are whole, the oldest first."""

    def take(self, name: str, drop_id: str) -> Drop | None:
        """Make a dropped file ours, durably. None when it is gone. Raises StorageFailure."""

    def taken(self) -> Iterator[Drop]:
        """Yield the drops that were taken and not finished, also by processes that died since."""
