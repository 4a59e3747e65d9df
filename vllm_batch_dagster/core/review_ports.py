"""What the curation needs of the place where people review answers: a Label Studio project (adapters/label_studio)."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from vllm_batch_dagster.core.review import KnownTask, ReviewTask


class ReviewBoard(Protocol):
    """One project. The server behind it knows no uniqueness: who adds looks up first, see stages/pushing.py.

    Every method raises ReviewFailed. After one from `add` the tasks may be there all the same.
    """

    @property
    def url(self) -> str:
        """Where a person opens the project."""

    def find(self, keys: Sequence[str]) -> Mapping[str, Sequence[KnownTask]]:
        """Return the tasks of at most 100 export keys, oldest first; keys without a task are left out."""

    def add(self, tasks: Sequence[ReviewTask]) -> None:
        """Add all tasks or none."""

    def remove(self, task: KnownTask) -> None:
        """Harmless when it is gone."""

    def count(self, batch_id: str) -> int:
        """Return how many tasks of a batch there are."""
