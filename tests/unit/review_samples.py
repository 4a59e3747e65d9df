"""Reviews and annotated tasks for tests, as Label Studio's export gives them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from vllm_batch_dagster.core.reviewed import AnnotatedTask, Asked, Review, read_review

SOURCE = "project-1-20261126"
BEGAN = "2026-11-26T02:00:00.000000Z"


def at(minute: int) -> str:
    return f"2026-11-26T02:{minute:02d}:00.000000Z"


def said(**answers: Any) -> list[dict[str, Any]]:
    """`result` of an annotation: verdict="edit", rating=4, correction="...", preference="B", issues=["format"]."""
    forms = {
        "verdict": "choices",
        "issues": "choices",
        "preference": "choices",
        "correction": "text",
        "rating": "rating",
    }
    return [
        {"from_name": name, "to_name": "answer", "type": forms[name], "value": {forms[name]: _as_sent(name, value)}}
        for name, value in answers.items()
    ]


def _as_sent(name: str, value: Any) -> Any:
    return value if name == "rating" or isinstance(value, list) else [value]


def annotation(number: int = 1, minute: int = 1, by: int = 1, **answers: Any) -> dict[str, Any]:
    is_skipped = answers.pop("skipped", False)
    return {
        "id": number,
        "completed_by": by,
        "result": said(**answers),
        "was_cancelled": is_skipped,
        "created_at": BEGAN,
        "updated_at": at(minute),
        "lead_time": 3.5,
    }


def task(
    number: int = 1,
    *annotations: Mapping[str, Any],
    answers: Sequence[str] = ("Paris.",),
    batch: str = "batch_1",
    minute: int = 30,
    **data: Any,
) -> AnnotatedTask:
    """Task `number` asks `question <number>`."""
    question = f"question {number}"
    labels = "ABCDEF"[: len(answers)]
    filled = {
        "export_key": f"{batch}/id-{number}",
        "batch_id": batch,
        "custom_id": f"id-{number}",
        "model": "tiny",
        "prompt": question,
        "messages": [{"role": "user", "content": question}],
        "answer": answers[0],
        "others": [
            {"title": f"Answer {label}", "text": text} for label, text in zip(labels[1:], answers[1:], strict=True)
        ],
        "options": [{"value": label} for label in labels] if len(answers) > 1 else [],
        "answer_hash": "|".join(answers),
    }
    return AnnotatedTask(number, {**filled, **data}, annotations, at(minute))


def review(
    number: int = 1,
    *,
    answers: Sequence[str] = ("Paris.",),
    request: Mapping[str, Any] | None = None,
    endpoint: str = "/v1/chat/completions",
    annotation_id: int = 1,
    minute: int = 1,
    by: int = 1,
    changes: Mapping[str, Any] | None = None,
    **what: Any,
) -> Review:
    """A review of task `number`; `what` as in `annotation`, `changes` are fields of Review."""
    body = "" if request is None else msgspec.json.encode(request).decode()
    asked = Asked("default", number, endpoint, body)
    made = read_review(SOURCE, task(number, answers=answers), annotation(annotation_id, minute, by, **what), asked)
    return replace(made, **(changes or {}))
