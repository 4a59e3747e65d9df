"""A judged answer as lines of training sets, in the conversational forms that TRL reads. Pure.

    SFT  {"messages": [..., {"role": "assistant", "content"}]}            accept: the answer; edit: the correction
    DPO  {"prompt": [...], "chosen": [...], "rejected": [...]}           edit: correction over answer; preference: the
                                                                         preferred answer over each other one
    KTO  {"prompt": [...], "completion": [...], "label": true | false}   accept: true; reject: false; edit: both

Source of the forms: TRL's page "Dataset formats and types", conversational: language modeling, preference and unpaired
preference; `tools` as there. Beside them every line has `metadata`, which the trainers ignore. Whatever yields no line
has a reason, which is counted. Called by stages/training_sets.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from vllm_batch_dagster.core.judging import Judgement
from vllm_batch_dagster.core.reviewed import Review

SFT, DPO, KTO = "sft", "dpo", "kto"
FORMATS = (SFT, DPO, KTO)

NO_VERDICT, REJECTED, UNCHANGED = "no_verdict", "rejected", "edited_without_a_change"
EMPTY, NOT_TEXT, NO_PROMPT = "empty_answer", "not_only_text", "no_prompt"
NO_PAIR = "nothing_to_compare"

Line = Mapping[str, Any]
_MESSAGE_KEYS = ("role", "name", "tool_calls", "tool_call_id")


def expected_answer(review: Review) -> str | None:
    """Return the answer that the person wants: the accepted one or the correction; None when there is neither."""
    if review.verdict == "accept" and review.answer.strip():
        return review.answer
    return correction_of(review)


def correction_of(review: Review) -> str | None:
    """Return the correction of an edit that changes something but white space around the text."""
    corrected = review.correction.strip()
    is_change = review.verdict == "edit" and corrected and corrected != review.answer.strip()
    return review.correction if is_change else None


def to_sft(judgement: Judgement) -> tuple[Sequence[Line], str]:
    """Return the lines, at most one, and the reason when there is none."""
    review = judgement.review
    prompt, reason = read_prompt_messages(review)
    answer = expected_answer(review)
    if reason or answer is None:
        return (), reason or _why_no_answer(review)
    return [{"messages": [*prompt, _assistant(answer)], **_extras(judgement)}], ""


def to_dpo(judgement: Judgement) -> tuple[Sequence[Line], str]:
    """Return a line for each pair, and the reason when there is none."""
    prompt, reason = read_prompt_messages(judgement.review)
    pairs = list(dict.fromkeys(_pairs(judgement.review)))
    if reason or not pairs:
        return (), reason or NO_PAIR
    lines = [
        {"prompt": prompt, "chosen": [_assistant(chosen)], "rejected": [_assistant(rejected)], **_extras(judgement)}
        for chosen, rejected in pairs
    ]
    return lines, ""


def to_kto(judgement: Judgement) -> tuple[Sequence[Line], str]:
    """Return a line for each completion that is known to be good or bad, and the reason when there is none."""
    review = judgement.review
    prompt, reason = read_prompt_messages(review)
    labelled = list(_labelled(review))
    if reason or not labelled:
        return (), reason or _why_no_answer(review)
    lines = [
        {"prompt": prompt, "completion": [_assistant(text)], "label": label, **_extras(judgement)}
        for text, label in labelled
    ]
    return lines, ""


CONVERSIONS = {SFT: to_sft, DPO: to_dpo, KTO: to_kto}


def _pairs(review: Review) -> Iterator[tuple[str, str]]:
    """Yield (chosen, rejected). Texts that differ only in white space around them are no pair."""
    corrected = correction_of(review)
    if corrected is not None and review.answer.strip():
        yield corrected, review.answer
    if 0 <= review.preference < len(review.answers):
        preferred = review.answers[review.preference]
        for other in review.answers:
            if preferred.strip() and other.strip() and other.strip() != preferred.strip():
                yield preferred, other


def _labelled(review: Review) -> Iterator[tuple[str, bool]]:
    corrected = correction_of(review)
    is_bad = review.verdict == "reject" or corrected is not None
    if review.answer.strip() and (is_bad or review.verdict == "accept"):
        yield review.answer, not is_bad
    if corrected is not None:
        yield corrected, True


def _why_no_answer(review: Review) -> str:
    if not review.verdict:
        return NO_VERDICT
    if review.verdict == "edit":
        return UNCHANGED if review.answer.strip() else EMPTY
    return REJECTED if review.verdict == "reject" and review.answer.strip() else EMPTY


def read_prompt_messages(review: Review) -> tuple[Sequence[Line], str]:
    """Return the conversation that was asked, with contents as text, and why it cannot be used."""
    asked = _decode(review.request, dict) or {"messages": _decode(review.messages, list) or []}
    messages = [_message(each) for each in _conversation(asked)]
    if any(each is None for each in messages):
        return (), NOT_TEXT
    found = [each for each in messages if each is not None]
    return found, "" if found else NO_PROMPT


def _decode(text: str, kind: type) -> Any:
    try:
        return msgspec.json.decode(text or "null", type=kind)
    except (msgspec.DecodeError, RecursionError):
        return None


def _conversation(asked: Mapping[str, Any]) -> list[Any]:
    """Return the messages of a chat, the input of a response with its instructions, or a prompt as the one message."""
    instructions = asked.get("instructions")
    before = [{"role": "system", "content": instructions}] if instructions else []
    said = asked.get("messages") or asked.get("input") or asked.get("prompt")
    if isinstance(said, list) and said and all(isinstance(each, dict) for each in said):
        return [*before, *said]
    return [*before, {"role": "user", "content": said}] if said else []


def _message(raw: Mapping[str, Any]) -> Line | None:
    """Return a message with its content as text; None when it has other parts. An item of a response that is no
    message, as a call of a tool, has no role and is none either."""
    content = _text(raw.get("content"))
    if content is None or not isinstance(raw.get("role"), str):
        return None
    kept = {key: raw[key] for key in _MESSAGE_KEYS if raw.get(key) is not None}
    return {**kept, "content": content}


def _text(content: object) -> str | None:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "\n".join(texts) if len(texts) == len(parts) else None


def _assistant(text: str) -> Line:
    return {"role": "assistant", "content": text}


def _extras(judgement: Judgement) -> Line:
    """Return what stands beside the conversation: the tools that were offered, and where the line comes from."""
    tools = (_decode(judgement.review.request, dict) or {}).get("tools")
    return {**({"tools": tools} if tools else {}), "metadata": provenance_of(judgement)}


def provenance_of(judgement: Judgement) -> Line:
    """Return where a judgement comes from; texts and numbers only, the same keys in every line."""
    review = judgement.review
    return {
        "batch_id": review.batch_id,
        "custom_id": review.custom_id,
        "project_id": review.project_id,
        "line": review.line,
        "model": review.model,
        "annotator": review.annotator,
        "verdict": review.verdict,
        "rating": review.rating,
        "reviewers": judgement.votes,
        "reviewed_at": review.updated_at,
    }
