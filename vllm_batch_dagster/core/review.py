"""A selected row as a task for a person, and what our labelling interface asks. Called by stages/pushing.py. Pure.

A task's `data` holds, beside `export_key` (`<batch_id>/<custom_id>`, by which nothing is added twice):

    batch_id, custom_id, model, system, prompt    texts
    messages      the conversation as asked, [{"role", "content"}], contents as text
    answer        the answer's text; of several choices the first
    others        the further choices, [{"title": "Answer B", "text"}]; empty for n = 1
    options       what `preference` offers, [{"value": "A"}, ...]; empty for n = 1
    compare       its heading, [{"title"}]; empty for n = 1
    why, rules, score    which rules chose it, as a sentence, as names, and the score of the first
    facts         custom_id, model and `why` in one line
    answer_hash   of all answers: another one means that the line was answered anew

and a person gives, by the names of the controls: `rating` (1 to 5), `verdict` (accept, edit, reject), `issues`,
`correction` (the answer's text, edited), all of them about `answer`, and `preference` (A, B, ...) among all answers.
"""

import hashlib
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

RATING, VERDICT, ISSUES, CORRECTION, PREFERENCE = "rating", "verdict", "issues", "correction", "preference"
VERDICTS = ("accept", "edit", "reject")
ISSUE_NAMES = ("factual", "format", "unsafe", "incomplete")
MAX_RATING = 5
ANSWER = "answer"
_LABELS = string.ascii_uppercase


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model proposes for a task, as Label Studio's `result` entries; `score` 0 to 1, None: not known."""

    model_version: str
    result: Sequence[Mapping[str, Any]]
    score: float | None = None


@dataclass(frozen=True, slots=True)
class ReviewTask:
    """One selected row. `data` is described above."""

    key: str
    answer_hash: str
    data: Mapping[str, Any]
    prediction: Prediction


@dataclass(frozen=True, slots=True)
class KnownTask:
    """A task that is there. `is_touched`: somebody has annotated, skipped or begun it."""

    id: int
    key: str
    answer_hash: str
    is_touched: bool


@dataclass(frozen=True, slots=True)
class Control:
    """A question of a labelling interface. `labels` are the choices that it offers, empty: they come with the task."""

    kind: str
    about: Sequence[str]
    labels: Sequence[str] = ()


def export_key(batch_id: str, custom_id: str) -> str:
    """Return the identity of a task."""
    return f"{batch_id}/{custom_id}"


def make_task(row: Mapping[str, Any]) -> ReviewTask:
    """Build the task of a selected row: core/candidates.py has its columns, core/selection.py `rules` and `score`."""
    answers = list(row["answers"])
    digest, why = hash_answers(answers), explain(row["rules"], row["score"])
    key = export_key(row["batch_id"], row["custom_id"])
    data = {
        "export_key": key,
        "batch_id": row["batch_id"],
        "custom_id": row["custom_id"],
        "model": row["model"],
        **_asked(row),
        "answer": answers[0] if answers else "",
        "others": [{"title": f"Answer {_label(at)}", "text": text} for at, text in enumerate(answers) if at > 0],
        "options": [{"value": _label(at)} for at in range(len(answers))] if len(answers) > 1 else [],
        "compare": [{"title": "Which answer is best?"}] if len(answers) > 1 else [],
        "why": why,
        "facts": f"{row['custom_id']} · {row['model']} · selected by {why}",
        "rules": ", ".join(row["rules"]),
        "score": row["score"],
        "answer_hash": digest,
    }
    return ReviewTask(key, digest, data, _predict(row, data["answer"]))


def hash_answers(answers: Sequence[str]) -> str:
    return hashlib.blake2b(msgspec.json.encode(answers), digest_size=8).hexdigest()


def explain(rules: Sequence[str], score: float | None) -> str:
    """Return why a row was selected, for a person."""
    shown = "" if score is None else f" (score {score:.3g})"
    return f"{rules[0]}{shown}" + "".join(f", {name}" for name in rules[1:])


def _asked(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = msgspec.json.decode(row["messages"])
    plain = [_plain(message) for message in messages]
    system = [each["content"] for each in plain if each["role"] in ("system", "developer")]
    return {"system": "\n\n".join(system), "prompt": row["prompt"], "messages": plain}


def _plain(message: Any) -> dict[str, str]:
    """Return role and text of a message; what is no text is named."""
    if not isinstance(message, dict):
        return {"role": "user", "content": flatten(message)}
    content = flatten(message.get("content"))
    for call in message.get("tool_calls") or ():
        content += f"\n[tool call] {msgspec.json.encode(call).decode()}"
    role = message.get("role") or message.get("type") or "user"
    return {"role": str(role), "content": content.strip("\n")}


def flatten(content: Any) -> str:
    """Return content as text: a string, or a list of parts, of which pictures and sound are only named."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_part(part) for part in content)
    return "" if content is None else str(content)


def _part(part: Any) -> str:
    if isinstance(part, dict) and "text" not in part:
        return f"[{part.get('type', 'part')}]"
    return flatten(part.get("text") if isinstance(part, dict) else part)


def _label(at: int) -> str:
    return _LABELS[at] if at < len(_LABELS) else str(at + 1)


def _predict(row: Mapping[str, Any], answer: str) -> Prediction:
    """The answer itself as the correction: text that only stands in the box is not stored unless somebody presses Add;
    a predicted one can be edited in place. Issues are what the machine can know."""
    issues = [name for name, flag in (("format", "breaks_schema"), ("incomplete", "is_cut")) if row[flag]]
    result = [_entry(CORRECTION, "textarea", {"text": [answer]})]
    if issues:
        result.append(_entry(ISSUES, "choices", {"choices": issues}))
    mean = row["mean_logprob"]
    return Prediction(str(row["model"]), result, None if mean is None else round(min(1.0, math.exp(mean)), 4))


def _entry(control: str, kind: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"id": control, "from_name": control, "to_name": ANSWER, "type": kind, "value": value}


def fit_result(result: Sequence[Mapping[str, Any]], controls: Mapping[str, Control]) -> Sequence[Mapping[str, Any]]:
    """Return the entries that a labelling interface can show: Label Studio itself takes anything, and then the page of
    the task breaks."""
    return [entry for entry in result if _fits(entry, controls.get(entry["from_name"]))]


def _fits(entry: Mapping[str, Any], control: Control | None) -> bool:
    if control is None or entry["type"] != control.kind or entry["to_name"] not in control.about:
        return False
    value = entry["value"]
    if control.kind == "choices":
        chosen = value["choices"]
        return bool(chosen) and (not control.labels or set(chosen) <= set(control.labels))
    return all(isinstance(text, str) for text in value["text"])
