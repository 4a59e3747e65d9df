"""Which judged answers are good enough to measure models against, and the identity of each. Pure.

An item is gold when its verdict is accept or edit, the answer that the person wants has text, its rating is at least
`min_rating`, and all who reviewed it agree on the verdict. The id follows from the prompt alone, so an item keeps it
when it is reviewed again or asked in another batch. Called by stages/gold_sets.py.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_batch_dagster.core.judging import TIED, Judgement
from vllm_batch_dagster.core.models import DEFAULT_PROJECT
from vllm_batch_dagster.core.training import NO_VERDICT, REJECTED, UNCHANGED, expected_answer, read_prompt_messages

# The key of a batch's metadata that names the version of the gold set that it asks.
REGRESSION_OF = "regression_of"
TOO_LOW, REPEATED = "rating_too_low", "repeated_prompt"
CHAT = "/v1/chat/completions"
# Where an answer is a text that can be compared.
ENDPOINTS = (CHAT, "/v1/completions", "/v1/responses")
NO_TEXT_ENDPOINT = "endpoint_without_text"


@dataclass(frozen=True, slots=True)
class GoldItem:
    """A prompt and the answer that people agreed on. `request` is the body to send, as JSON; `answer` what the model
    had said."""

    id: str
    export_key: str
    batch_id: str
    custom_id: str
    project_id: str
    line: int
    endpoint: str
    model: str
    request: str
    prompt: str
    expected: str
    answer: str
    verdict: str
    rating: int
    reviewers: int
    annotator: str
    reviewed_at: str


def to_gold(judgement: Judgement, min_rating: int) -> GoldItem | str:
    """Return the item, or the reason why it is not gold."""
    review = judgement.review
    expected = expected_answer(review)
    messages, reason = read_prompt_messages(review)
    if reason or expected is None:
        return reason or _why(review.verdict)
    if not judgement.is_unanimous:
        return TIED
    if review.rating < min_rating:
        return TOO_LOW
    if (review.endpoint or CHAT) not in ENDPOINTS:
        return NO_TEXT_ENDPOINT
    return _make_item(judgement, expected, messages)


def _make_item(judgement: Judgement, expected: str, messages: object) -> GoldItem:
    review = judgement.review
    return GoldItem(
        id=gold_id(messages),
        export_key=review.export_key,
        batch_id=review.batch_id,
        custom_id=review.custom_id,
        project_id=review.project_id or DEFAULT_PROJECT,
        line=review.line,
        endpoint=review.endpoint or CHAT,
        model=review.model,
        request=review.request or _rebuild(review.model, messages),
        prompt=review.prompt,
        expected=expected,
        answer=review.answer,
        verdict=review.verdict,
        rating=review.rating,
        reviewers=judgement.votes,
        annotator=review.annotator,
        reviewed_at=review.updated_at,
    )


def gold_id(messages: object) -> str:
    """Return the id of a prompt."""
    return f"gold-{hashlib.blake2b(msgspec.json.encode(messages), digest_size=10).hexdigest()}"


def request_line(item_id: str, endpoint: str, request: str, model: str) -> bytes:
    """Return the line of a batch file that asks a request again; `model` empty: of the same model."""
    body: dict[str, Any] = msgspec.json.decode(request)
    if model:
        body["model"] = model
    return write_line(item_id, endpoint, body)


def write_line(custom_id: str, endpoint: str, body: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode({"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}) + b"\n"


def _rebuild(model: str, messages: object) -> str:
    return msgspec.json.encode({"model": model, "messages": messages}).decode()


def _why(verdict: str) -> str:
    return {"": NO_VERDICT, "edit": UNCHANGED}.get(verdict, REJECTED)
