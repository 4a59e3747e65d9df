"""A reviewer for the demo of the curation: annotates every task that nobody has, through Label Studio's API.

What it says follows from the task, so that a second demo on the same state finds nothing to say.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

from vllm_batch_dagster.adapters.label_studio import LabelStudioSession

TITLE = "vLLM batches"
_PAGE = 100
_FOUND = "id,data,total_annotations,cancelled_annotations"
_SENTENCE = re.compile(r".+?[.!?](?=\s|$)", re.DOTALL)
# Out of twenty tasks: so many accepted, edited, rejected and skipped.
_MIX = ("accept",) * 11 + ("edit",) * 6 + ("reject",) * 2 + ("skip",)


def find_project(session: LabelStudioSession) -> int:
    """Return the number of the project that the push has made."""
    listed = session.get("/api/projects/", title=TITLE, page_size=_PAGE, include="id,title")["results"]
    return min(int(project["id"]) for project in listed if project["title"] == TITLE)


def list_tasks(session: LabelStudioSession, project: int) -> Sequence[Mapping[str, Any]]:
    """Return the tasks of the demo, a hundred at most, by id."""
    said = session.get("/api/tasks/", project=project, query="{}", include=_FOUND, page_size=_PAGE, page=1)
    return sorted(said["tasks"], key=lambda task: int(task["id"]))


def is_reviewed(task: Mapping[str, Any]) -> bool:
    return bool(task["total_annotations"] or task["cancelled_annotations"])


def find_edited(session: LabelStudioSession, tasks: Sequence[Mapping[str, Any]]) -> int:
    """Return the id of the first task with a corrected answer, of the first one when there is none."""
    for task in tasks:
        for said in session.get(f"/api/tasks/{task['id']}/annotations/"):
            if any(entry["from_name"] == "correction" for entry in said["result"]):
                return int(task["id"])
    return int(tasks[0]["id"])


def review(session: LabelStudioSession, tasks: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Annotate what is not annotated. Returns how often what was said."""
    said: Counter[str] = Counter()
    order = sorted(tasks, key=lambda task: crc32(task["data"]["custom_id"].encode()))
    for place, task in enumerate(order):
        if not is_reviewed(task):
            verdict = _MIX[place * 7 % len(_MIX)]
            session.post(f"/api/tasks/{task['id']}/annotations/", _annotation(task["data"]["answer"], verdict, place))
            said[verdict] += 1
    return said


def _annotation(answer: str, verdict: str, place: int) -> dict[str, Any]:
    if verdict == "skip":
        return {"result": [], "was_cancelled": True, "lead_time": 4.0}
    return {"result": list(_result(answer, verdict, place)), "lead_time": 10.0 + place}


def _result(answer: str, verdict: str, place: int) -> Iterator[dict[str, Any]]:
    yield _entry("verdict", "choices", {"choices": [verdict]})
    yield _entry(
        "rating", "rating", {"rating": {"accept": 5, "edit": 4}.get(verdict, 1) - place % 2 * (verdict == "accept")}
    )
    if verdict == "edit":
        yield _entry("issues", "choices", {"choices": ["format"]})
        yield _entry("correction", "textarea", {"text": [correct(answer)]})
    if verdict == "reject":
        yield _entry("issues", "choices", {"choices": ["factual", "incomplete"]})


def _entry(control: str, kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": control, "from_name": control, "to_name": "answer", "type": kind, "value": value}


def correct(answer: str) -> str:
    """Return the first sentence alone: small models ramble. One that is short already gets a full stop or loses it."""
    text = answer.strip()
    found = _SENTENCE.match(text)
    first = found[0] if found else f"{text}."
    return first if first != text else text.rstrip(".!?")
