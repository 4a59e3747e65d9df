"""What a person said about an answer: one version of one annotation, read from Label Studio's task. Pure.

Called by stages/pulling.py for every annotation that comes back. The server checks no value of an annotation, so each
is read with care here, and what does not fit the question counts as not answered. The names of the questions and of
the task's data are in core/review.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import msgspec

from vllm_batch_dagster.core.review import CORRECTION, ISSUES, MAX_RATING, PREFERENCE, RATING, VERDICT, VERDICTS


class ReviewState(StrEnum):
    """`skipped`: the person cancelled the task. `withdrawn`: the annotation was there and has been deleted."""

    FINISHED = "finished"
    SKIPPED = "skipped"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class AnnotatedTask:
    """A task as the server has it now; `annotations` in its own words, without drafts. `updated_at` in ISO 8601. One
    without annotations may come without `data`."""

    id: int
    data: Mapping[str, Any]
    annotations: Sequence[Mapping[str, Any]]
    updated_at: str


@dataclass(frozen=True, slots=True)
class Asked:
    """The request behind a reviewed answer: `line` as in the curated data set, -1 when unknown; `request` the body as
    it was sent. Of a batch that is gone nothing is known."""

    project_id: str = ""
    line: int = -1
    endpoint: str = ""
    request: str = ""


@dataclass(frozen=True, slots=True)
class Review:
    """One version of one annotation. Times are UTC with microseconds, `2026-11-26T02:37:11.308487Z`, so that they sort
    as text.

    `source` is the Label Studio project it came from, `project_id` that of the batch; `answers` all choices of the
    line, the first is the one judged; `rating` 1 to 5, 0: none; `preference` the place of the preferred answer, -1:
    none; `lead_seconds` the time the person took.
    """

    source: str
    export_key: str
    batch_id: str
    custom_id: str
    project_id: str
    line: int
    endpoint: str
    model: str
    request: str
    messages: str
    prompt: str
    answers: Sequence[str]
    answer_hash: str
    task_id: int
    annotation_id: int
    annotator: str
    created_at: str
    updated_at: str
    state: str
    verdict: str
    rating: int
    issues: Sequence[str]
    correction: str
    preference: int
    lead_seconds: float

    @property
    def version(self) -> tuple[str, str, int, str]:
        """What is kept once."""
        return self.source, self.export_key, self.annotation_id, self.updated_at

    @property
    def answer(self) -> str:
        return self.answers[0] if self.answers else ""


def is_ours(task: AnnotatedTask) -> bool:
    """False for a task that somebody else has put into the project."""
    return all(isinstance(task.data.get(name), str) for name in ("export_key", "batch_id", "custom_id"))


def read_review(source: str, task: AnnotatedTask, annotation: Mapping[str, Any], asked: Asked) -> Review:
    """Return what an annotation says. Raises ValueError for a time or a number that is none."""
    data, said, (answers, labels) = task.data, _by_question(annotation.get("result")), _answers(task.data)
    return Review(
        source=source,
        export_key=data["export_key"],
        batch_id=data["batch_id"],
        custom_id=data["custom_id"],
        project_id=asked.project_id,
        line=asked.line,
        endpoint=asked.endpoint,
        model=str(data.get("model") or ""),
        request=asked.request,
        messages=msgspec.json.encode(data.get("messages") or []).decode(),
        prompt=str(data.get("prompt") or ""),
        answers=answers,
        answer_hash=str(data.get("answer_hash") or ""),
        task_id=task.id,
        annotation_id=int(annotation["id"]),
        annotator=_annotator(annotation.get("completed_by")),
        created_at=read_time(annotation.get("created_at") or annotation["updated_at"]),
        updated_at=read_time(annotation["updated_at"]),
        state=_state(annotation),
        verdict=_one_of(VERDICTS, _texts(said, VERDICT, "choices")),
        rating=_rating(said.get(RATING, {}).get("rating")),
        issues=_texts(said, ISSUES, "choices"),
        correction=_first(_texts(said, CORRECTION, "text")),
        preference=_place(labels, _texts(said, PREFERENCE, "choices")),
        lead_seconds=_seconds(annotation.get("lead_time")),
    )


def read_time(text: str) -> str:
    """Return a time of the server in the one form in which times sort as text. Raises ValueError."""
    return show_time(datetime.fromisoformat(text))


def show_time(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _state(annotation: Mapping[str, Any]) -> str:
    return (ReviewState.SKIPPED if annotation.get("was_cancelled") else ReviewState.FINISHED).value


def _answers(data: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the texts of all answers and their labels. A task of one answer offers no preference."""
    others = [each for each in data.get("others") or () if isinstance(each, dict)]
    texts = [str(data.get("answer") or ""), *(str(each.get("text") or "") for each in others)]
    return texts, [str(each.get("value")) for each in data.get("options") or () if isinstance(each, dict)]


def _by_question(result: object) -> Mapping[str, Mapping[str, Any]]:
    entries = result if isinstance(result, list) else []
    return {
        str(entry.get("from_name")): entry["value"]
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("value"), dict)
    }


def _texts(said: Mapping[str, Mapping[str, Any]], question: str, field: str) -> list[str]:
    value = said.get(question, {}).get(field)
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str)]


def _one_of(known: Sequence[str], chosen: Sequence[str]) -> str:
    return next((each for each in chosen if each in known), "")


def _first(texts: Sequence[str]) -> str:
    return texts[0] if texts else ""


def _place(labels: Sequence[str], chosen: Sequence[str]) -> int:
    return next((labels.index(each) for each in chosen if each in labels), -1)


def _rating(rating: object) -> int:
    if not isinstance(rating, int) or isinstance(rating, bool):
        return 0
    return rating if 1 <= rating <= MAX_RATING else 0


def _seconds(value: object) -> float:
    return round(float(value), 3) if isinstance(value, int | float) else 0.0


def _annotator(user: object) -> str:
    """Return the id of a user: enough to tell people apart, and no name of anybody."""
    found = user.get("id") if isinstance(user, dict) else user
    return "" if found is None else str(found)
