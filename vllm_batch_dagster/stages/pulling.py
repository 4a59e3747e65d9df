"""Brings back what people said: every version of every annotation once. In: a project; out: a folder of review rows.

A pull reads the tasks that have changed since the mark of the one before, and a while more, because a change becomes
visible only when its transaction ends. What is known already is left out, so pulls may be repeated, cut off and
overlap. An annotation that its task does not have any more is noted as withdrawn.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from vllm_batch_dagster.core.annotation_ports import AnnotationSource
from vllm_batch_dagster.core.judging import newest_versions
from vllm_batch_dagster.core.ports import BatchStore, FileStore, Workspace
from vllm_batch_dagster.core.reviewed import (
    AnnotatedTask,
    Asked,
    Review,
    ReviewState,
    is_ours,
    read_review,
    read_time,
    show_time,
)
from vllm_batch_dagster.stages.originals import find_requests
from vllm_batch_dagster.stages.review_rows import PullFolder, ReviewRows

OVERLAP = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class PullPorts:
    """`folder` of the review rows; `alone` holds it against other pulls."""

    store: BatchStore
    files: FileStore
    workspace: Workspace
    folder: Path
    alone: Callable[[], AbstractContextManager[object]]


@dataclass(slots=True)
class PullReport:
    """What a pull found. `tasks` were looked at, `new` versions written, by state; `foreign` tasks are not ours, and
    `unreadable` annotations have no time or no id."""

    path: Path | None = None
    since: str | None = None
    tasks: int = 0
    new: Counter[str] = field(default_factory=Counter)
    foreign: int = 0
    unreadable: int = 0


def is_behind(source: AnnotationSource, folder: Path) -> bool:
    """True when a task of the project has changed after the last pull."""
    newest, mark = source.newest(), ReviewRows(folder).mark(source.id)
    return newest is not None and (mark is None or newest > mark)


def pull_reviews(source: AnnotationSource, ports: PullPorts, *, everything: bool = False) -> PullReport:
    """Write the new versions since the last pull; with `everything`, look at all tasks. Raises ReviewFailed,
    StorageFailure; then nothing was written."""
    with ports.alone():
        rows, newest = ReviewRows(ports.folder), source.newest()
        mark = None if everything else rows.mark(source.id)
        report = PullReport(since=mark)
        if newest is None:
            return report
        fresh = PullFolder(ports.folder)
        for page in source.changed(_before(mark)):
            fresh.add(_with_requests(list(_new_versions(source.id, page, rows, report)), ports))
        report.path = fresh.publish(source.id, newest)
        rows.set_mark(source.id, newest)
        return report


def _before(mark: str | None) -> str | None:
    return None if mark is None else show_time(datetime.fromisoformat(mark) - OVERLAP)


def _new_versions(source: str, page: Sequence[AnnotatedTask], rows: ReviewRows, report: PullReport) -> Iterator[Review]:
    known = rows.known(source, [task.id for task in page])
    versions = {each.version for each in known}
    by_task: dict[int, list[Review]] = {}
    for each in known:
        by_task.setdefault(each.task_id, []).append(each)
    for task in page:
        report.tasks += 1
        for review in (*_read(source, task, report), *_withdrawn(task, by_task.get(task.id, ()))):
            if review.version not in versions:
                versions.add(review.version)
                report.new[review.state] += 1
                yield review


def _read(source: str, task: AnnotatedTask, report: PullReport) -> Iterator[Review]:
    if task.annotations and not is_ours(task):
        report.foreign += 1
        return
    for annotation in task.annotations:
        try:
            yield read_review(source, task, annotation, Asked())
        except (KeyError, TypeError, ValueError):
            report.unreadable += 1


def _withdrawn(task: AnnotatedTask, known: Sequence[Review]) -> Iterator[Review]:
    """Yield a last version of each annotation that the task does not have any more."""
    present = {annotation.get("id") for annotation in task.annotations}
    for each in newest_versions(known):
        if each.annotation_id not in present and each.state != ReviewState.WITHDRAWN:
            gone_at = max(read_time(task.updated_at), each.updated_at)
            yield replace(each, state=ReviewState.WITHDRAWN.value, updated_at=_after(gone_at))


def _after(moment: str) -> str:
    # The deletion must not be taken for the version that it ends.
    return show_time(datetime.fromisoformat(moment) + timedelta(microseconds=1))


def _with_requests(reviews: Sequence[Review], ports: PullPorts) -> Iterator[Review]:
    """Put the requests beside what was said about their answers."""
    wanted: dict[str, set[str]] = {}
    for each in reviews:
        wanted.setdefault(each.batch_id, set()).add(each.custom_id)
    asked: dict[str, Mapping[str, Asked]] = {
        batch_id: find_requests(batch_id, ids, ports.store, ports.files, ports.workspace)
        for batch_id, ids in wanted.items()
    }
    for each in reviews:
        found = asked[each.batch_id].get(each.custom_id)
        if found is None or each.request:
            yield each
        else:
            yield replace(each, **asdict(found))
