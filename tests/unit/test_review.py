"""A selected row as a task: what a person sees, and which predictions an interface can show."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.label_studio.rows import row
from vllm_batch_dagster.adapters.label_studio import title_of
from vllm_batch_dagster.adapters.label_studio.tokens import AccessToken, is_personal
from vllm_batch_dagster.core.review import Control, fit_result, flatten, make_task

CORRECTION = {"from_name": "correction", "to_name": "answer", "type": "textarea", "value": {"text": ["x"]}}
ISSUES = {"from_name": "issues", "to_name": "answer", "type": "choices", "value": {"choices": ["format"]}}


def messages(*contents: Any) -> str:
    return msgspec.json.encode([{"role": role, "content": content} for role, content in contents]).decode()


def test_one_answer() -> None:
    task = make_task(row(1))
    assert task.key == task.data["export_key"] == "batch_1/id-1"
    assert (task.data["system"], task.data["prompt"], task.data["answer"]) == ("Be brief.", "question 1", "answer 1")
    assert task.data["others"] == task.data["options"] == task.data["compare"] == []
    assert task.data["facts"] == "id-1 · tiny · selected by random"


def test_several_answers() -> None:
    data = make_task(row(1, answers=tuple("abc"))).data
    assert data["answer"] == "a"
    assert data["others"] == [{"title": "Answer B", "text": "b"}, {"title": "Answer C", "text": "c"}]
    assert [each["value"] for each in data["options"]] == ["A", "B", "C"]


def test_contents_that_are_no_text_are_named() -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:..."}}]
    assert flatten(parts) == "look\n[image_url]"
    asked = make_task(row(1, messages=messages(("user", parts), ("assistant", None)))).data["messages"]
    assert asked == [{"role": "user", "content": "look\n[image_url]"}, {"role": "assistant", "content": ""}]


@given(st.lists(st.one_of(st.text(), st.none(), st.dictionaries(st.text(), st.text() | st.none()))))
def test_any_conversation_makes_a_task(conversation: list[Any]) -> None:
    data = make_task(row(1, messages=msgspec.json.encode(conversation).decode())).data
    assert all(isinstance(value, str) for turn in data["messages"] for value in turn.values())
    assert len(data["messages"]) == len(conversation)


def test_the_hash_follows_all_answers_and_nothing_else() -> None:
    one = make_task(row(1, answers=("a", "b"))).answer_hash
    assert make_task(row(1, answers=("a", "b"), rules=["other"], score=1.0)).answer_hash == one
    assert (
        len({one, make_task(row(1, answers=("a",))).answer_hash, make_task(row(1, answers=("a", "c"))).answer_hash})
        == 3
    )


@pytest.mark.parametrize(
    ("control", "fits"),
    [
        (Control("choices", ("answer",), ("format", "unsafe")), True),
        (Control("choices", ("answer", "prompt")), True),  # choices that come with the task
        (Control("choices", ("answer",), ("unsafe",)), False),
        (Control("choices", ("prompt",), ("format",)), False),
        (Control("textarea", ("answer",)), False),
        (None, False),
    ],
)
def test_predictions_that_an_interface_cannot_show_are_left_out(control: Control | None, fits: bool) -> None:
    controls = {"correction": Control("textarea", ("answer",))} | ({"issues": control} if control else {})
    assert fit_result([CORRECTION, ISSUES], controls) == [CORRECTION, *([ISSUES] if fits else [])]


def test_titles_are_short_and_each_project_has_its_own() -> None:
    long = ["proj-" + "x" * 60 + end for end in "ab"]
    titles = [title_of(project) for project in ("default", "blue", *long)]
    assert len(set(titles)) == 4
    assert max(map(len, titles)) <= 50
    assert title_of("blue") == "vLLM batches: blue"


@given(st.text())
def test_no_text_is_taken_for_a_personal_token_by_mistake(key: str) -> None:
    assert not is_personal(key)


def test_a_token_without_a_lifetime_is_renewed_before_five_minutes() -> None:
    now = [0.0]
    token = AccessToken(lambda: now[0])
    assert not token.is_good
    token.take("opaque")
    now[0] = 239.0
    assert token.is_good
    now[0] = 241.0
    assert not token.is_good
