"""What the way back needs of the place where people review answers. See adapters/label_studio/annotations.py."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from vllm_batch_dagster.core.reviewed import AnnotatedTask


class AnnotationSource(Protocol):
    """One project. Every method raises ReviewFailed."""

    @property
    def id(self) -> str:
        """Its name for all time, wherever its server moves."""

    @property
    def url(self) -> str:
        """Where a person opens the project."""

    def newest(self) -> str | None:
        """Return when any task changed last, None when there is no task. Times as in core/reviewed.py."""

    def changed(self, since: str | None) -> Iterator[Sequence[AnnotatedTask]]:
        """Yield pages of the tasks that changed at `since` or later (None: all), each task once. A change of an
        annotation, and its deletion, is a change of its task."""
