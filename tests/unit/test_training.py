"""A judged answer as lines of the training sets: the forms that TRL reads, and why there is no line."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.review_samples import review
from vllm_batch_dagster.core.judging import Judgement
from vllm_batch_dagster.core.training import CONVERSIONS, to_dpo, to_kto, to_sft

ASKED = [{"role": "user", "content": "question 1"}]


def judged(**what: Any) -> Judgement:
    return Judgement(review(**what), 1, 1)


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def shown(lines: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "metadata"} for line in lines]


def test_an_accepted_answer() -> None:
    accepted = judged(verdict="accept", rating=5)
    assert shown(to_sft(accepted)[0]) == [{"messages": [*ASKED, *assistant("Paris.")]}]
    assert to_dpo(accepted) == ((), "nothing_to_compare")
    assert shown(to_kto(accepted)[0]) == [{"prompt": ASKED, "completion": assistant("Paris."), "label": True}]


def test_a_corrected_answer() -> None:
    edited = judged(verdict="edit", correction="Rome.")
    assert shown(to_sft(edited)[0]) == [{"messages": [*ASKED, *assistant("Rome.")]}]
    assert shown(to_dpo(edited)[0]) == [
        {"prompt": ASKED, "chosen": assistant("Rome."), "rejected": assistant("Paris.")}
    ]
    assert shown(to_kto(edited)[0]) == [
        {"prompt": ASKED, "completion": assistant("Paris."), "label": False},
        {"prompt": ASKED, "completion": assistant("Rome."), "label": True},
    ]


def test_a_rejected_answer() -> None:
    rejected = judged(verdict="reject", correction="Paris.")
    assert to_sft(rejected) == ((), "rejected")
    assert to_dpo(rejected) == ((), "nothing_to_compare")
    assert shown(to_kto(rejected)[0]) == [{"prompt": ASKED, "completion": assistant("Paris."), "label": False}]


def test_a_preferred_answer_beats_each_other_one() -> None:
    preferred = judged(answers=("a", "b", "c", "b"), verdict="reject", preference="B")
    assert [(line["chosen"], line["rejected"]) for line in to_dpo(preferred)[0]] == [
        (assistant("b"), assistant("a")),
        (assistant("b"), assistant("c")),
    ]


def test_a_correction_and_a_preference_both_give_pairs() -> None:
    both = judged(answers=("a", "b"), verdict="edit", correction="A!", preference="B")
    assert [(line["chosen"], line["rejected"]) for line in to_dpo(both)[0]] == [
        (assistant("A!"), assistant("a")),
        (assistant("b"), assistant("a")),
    ]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"verdict": "edit", "correction": " Paris. \n"}, "edited_without_a_change"),
        ({"verdict": "edit"}, "edited_without_a_change"),
        ({"verdict": "accept", "answers": (" ",)}, "empty_answer"),
        ({"rating": 5}, "no_verdict"),
        (
            {"verdict": "accept", "request": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}},
            "not_only_text",
        ),
        ({"verdict": "accept", "changes": {"messages": "[]"}}, "no_prompt"),
    ],
)
def test_why_there_is_no_line(what: dict[str, Any], reason: str) -> None:
    assert to_sft(judged(**what)) == ((), reason)


def test_the_request_as_it_was_sent_is_the_prompt() -> None:
    """Parts become text, tools and calls stay; the task holds a plainer copy."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    request = {
        "model": "m",
        "tools": tools,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
        ],
    }
    (line,) = to_sft(judged(verdict="accept", request=request))[0]
    assert line["tools"] == tools
    assert line["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "tool_calls": calls, "content": ""},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
        *assistant("Paris."),
    ]


@pytest.mark.parametrize(
    ("request_body", "messages"),
    [
        ({"prompt": "Once"}, [{"role": "user", "content": "Once"}]),
        (
            {"input": "Hi", "instructions": "Be kind."},
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
            [{"role": "user", "content": "Hi"}],
        ),
    ],
)
def test_prompts_of_other_endpoints(request_body: dict[str, Any], messages: list[dict[str, str]]) -> None:
    (line,) = to_sft(judged(verdict="accept", request=request_body))[0]
    assert line["messages"] == [*messages, *assistant("Paris.")]


def test_every_line_says_where_it_comes_from() -> None:
    (line,) = to_sft(judged(verdict="accept", rating=4, by=7, minute=6))[0]
    assert line["metadata"] == {
        "batch_id": "batch_1",
        "custom_id": "id-1",
        "project_id": "default",
        "line": 1,
        "model": "tiny",
        "annotator": "7",
        "verdict": "accept",
        "rating": 4,
        "reviewers": 1,
        "reviewed_at": "2026-11-26T02:06:00.000000Z",
    }


_TEXTS = st.sampled_from(["", " ", "a", "b", " a"])
_JUDGED = st.builds(
    judged,
    answers=st.lists(_TEXTS, min_size=1, max_size=4).map(tuple),
    verdict=st.sampled_from(["accept", "edit", "reject", "none"]),
    correction=_TEXTS,
    preference=st.sampled_from("ABCDX"),
)


@given(each=_JUDGED)
def test_lines_or_a_reason(each: Judgement) -> None:
    """Never both, never neither; nothing is preferred to itself, and no completion is empty or both good and bad."""
    for convert in CONVERSIONS.values():
        lines, reason = convert(each)
        assert bool(lines) != bool(reason)
    for line in to_dpo(each)[0]:
        chosen, rejected = line["chosen"][0]["content"].strip(), line["rejected"][0]["content"].strip()
        assert chosen != rejected
        assert "" not in (chosen, rejected)
    labels = [(line["completion"][0]["content"].strip(), line["label"]) for line in to_kto(each)[0]]
    assert len({text for text, _label in labels if text}) == len(labels)
