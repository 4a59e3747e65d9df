"""Reviewer corrections as the input of a next batch: examples to show a model, and the prompts to ask again. Pure.

Examples are turns of a user and an assistant, taken from judged answers; corrections come before accepted answers,
better ratings before worse ones, newer before older. Called by stages/review_export.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_batch_dagster.core.gold import CHAT, write_line
from vllm_batch_dagster.core.judging import Judgement
from vllm_batch_dagster.core.training import correction_of, expected_answer, read_prompt_messages

NOT_A_CHAT = "no_chat"
_LEADING = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Example:
    """A question and the answer that a person wants. `rank` is greater for a better example."""

    export_key: str
    rank: tuple[int, int, str]
    messages: Sequence[Mapping[str, Any]]


def to_example(judgement: Judgement) -> Example | str:
    """Return the example of a judgement, or why it gives none."""
    review = judgement.review
    answer, (messages, reason) = expected_answer(review), read_prompt_messages(review)
    if reason or answer is None:
        return reason or review.verdict or "no_verdict"
    turns = [each for each in messages if each["role"] not in _LEADING]
    if len(turns) != 1 or turns[0]["role"] != "user":
        return "more_than_one_turn"
    rank = (int(correction_of(review) is not None), review.rating, review.updated_at)
    shown = [turns[0], {"role": "assistant", "content": answer}]
    return Example(review.export_key, rank, shown)


def ask_again(judgement: Judgement, examples: Sequence[Example], model: str) -> bytes | str:
    """Return the line that asks the prompt of a judgement again, with `examples` of other prompts behind the system
    message; or why there is none. `model` empty: of the same model. The custom_id is `<batch_id>/<custom_id>`."""
    review = judgement.review
    messages, reason = read_prompt_messages(review)
    if reason and not review.request:
        return reason
    endpoint = review.endpoint or CHAT
    body: dict[str, Any] = {"model": review.model, "messages": messages}
    if review.request:
        body = msgspec.json.decode(review.request)
    shown = [message for each in examples if each.export_key != review.export_key for message in each.messages]
    if shown:
        if endpoint != CHAT:
            return NOT_A_CHAT
        body["messages"] = _behind_the_system(body["messages"], shown)
    if model:
        body["model"] = model
    return write_line(review.export_key, endpoint, body)


def _behind_the_system(
    messages: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    lead = next((at for at, each in enumerate(messages) if each.get("role") not in _LEADING), len(messages))
    return [*messages[:lead], *shown, *messages[lead:]]
