"""Which judged answers are gold, what their ids follow from, and the prompts of a next batch."""

from typing import Any

import msgspec
import pytest

from tests.unit.review_samples import review
from vllm_batch_dagster.core.few_shot import Example, ask_again, to_example
from vllm_batch_dagster.core.gold import GoldItem, request_line, to_gold
from vllm_batch_dagster.core.judging import Judgement

REQUEST = {
    "model": "tiny",
    "temperature": 0,
    "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
}


def judged(votes: int = 1, agreeing: int = 1, **what: Any) -> Judgement:
    return Judgement(review(**what), votes, agreeing)


def gold(**what: Any) -> GoldItem:
    item = to_gold(judged(**what), 4)
    assert isinstance(item, GoldItem), item
    return item


def test_an_accepted_and_a_corrected_answer_are_gold() -> None:
    assert gold(verdict="accept", rating=4).expected == "Paris."
    assert gold(verdict="edit", rating=5, correction="Rome.").expected == "Rome."


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"verdict": "accept", "rating": 3}, "rating_too_low"),
        ({"verdict": "accept"}, "rating_too_low"),
        ({"verdict": "reject", "rating": 5}, "rejected"),
        ({"verdict": "edit", "rating": 5}, "edited_without_a_change"),
        ({"rating": 5}, "no_verdict"),
        ({"verdict": "accept", "rating": 5, "votes": 3, "agreeing": 2}, "reviewers_disagree"),
        ({"verdict": "accept", "rating": 5, "endpoint": "/v1/embeddings"}, "endpoint_without_text"),
    ],
)
def test_why_an_answer_is_not_gold(what: dict[str, Any], reason: str) -> None:
    assert to_gold(judged(**what), 4) == reason


def test_the_id_follows_from_the_prompt_alone() -> None:
    first = gold(verdict="accept", rating=4, request=REQUEST)
    again = gold(verdict="edit", rating=5, correction="x", minute=9, by=2, request={**REQUEST, "temperature": 1})
    assert first.id == again.id
    assert gold(number=2, verdict="accept", rating=4).id != gold(number=3, verdict="accept", rating=4).id


def test_the_request_is_asked_again_as_it_was() -> None:
    item = gold(verdict="accept", rating=4, request=REQUEST)
    line = msgspec.json.decode(request_line(item.id, item.endpoint, item.request, ""))
    assert line == {"custom_id": item.id, "method": "POST", "url": "/v1/chat/completions", "body": REQUEST}
    other = msgspec.json.decode(request_line(item.id, item.endpoint, item.request, "other"))
    assert other["body"] == {**REQUEST, "model": "other"}


def test_a_request_that_is_gone_is_made_of_the_task() -> None:
    item = gold(verdict="accept", rating=4)
    assert msgspec.json.decode(item.request) == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "question 1"}],
    }


def test_an_example_is_a_question_and_the_wanted_answer() -> None:
    example = to_example(judged(verdict="edit", correction="Rome.", request=REQUEST))
    assert isinstance(example, Example)
    assert example.messages == [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Rome."}]
    better = to_example(judged(verdict="accept", rating=5))
    assert isinstance(better, Example)
    assert example.rank > better.rank, "a correction says more than a praise"
    assert to_example(judged(verdict="reject")) == "reject"


def test_a_prompt_is_asked_again_behind_examples_of_others() -> None:
    own, other = (Example(f"batch_1/id-{number}", (1, 0, ""), [{"role": "user", "content": "E"}]) for number in (1, 2))
    line = ask_again(judged(verdict="reject", request=REQUEST), [own, other], "big")
    assert isinstance(line, bytes)
    decoded = msgspec.json.decode(line)
    assert decoded["custom_id"] == "batch_1/id-1"
    assert decoded["body"] == {
        "model": "big",
        "temperature": 0,
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "E"},
            {"role": "user", "content": "Q"},
        ],
    }


def test_examples_stand_only_in_chats() -> None:
    other = Example("batch_1/id-2", (1, 0, ""), [{"role": "user", "content": "E"}])
    completion = judged(verdict="reject", endpoint="/v1/completions", request={"model": "tiny", "prompt": "Once"})
    assert ask_again(completion, [other], "") == "no_chat"
    assert isinstance(ask_again(completion, [], ""), bytes)
