"""Turns an answered request into a row of a training set.

Called for every answered line (core/candidates.py); core/selection.py decides which rows are kept. Prompts and answers
come out as plain text beside the full messages, so that a person can read the set and a trainer can use it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_batch_dagster.core.answers import read_answer


@dataclass(frozen=True, slots=True)
class CuratedRow:
    """One prompt and its answer. `messages` is JSON; lengths in tokens."""

    batch_id: str
    line: int
    custom_id: str
    model: str
    prompt: str
    messages: str
    answer: str
    finish_reason: str
    input_tokens: int
    output_tokens: int
    prompt_hash: str


def make_row(batch_id: str, line: int, custom_id: str, request: bytes, answer: bytes) -> CuratedRow:
    """Build the row of one answered line from the user's body and the engine's body.

    Raises msgspec.DecodeError for JSON that Python cannot hold (1e999).
    """
    asked: dict[str, Any] = msgspec.json.decode(request)
    said: dict[str, Any] = msgspec.json.decode(answer)
    facts = read_answer(answer)
    messages = _messages(asked)
    encoded = msgspec.json.encode(messages)
    return CuratedRow(
        batch_id=batch_id,
        line=line,
        custom_id=custom_id,
        model=str(said.get("model") or asked.get("model") or ""),
        prompt=read_prompt(asked),
        messages=encoded.decode(),
        answer=read_text(said),
        finish_reason=facts.finish_reasons[0] if facts.finish_reasons else "",
        input_tokens=facts.usage.input_tokens,
        output_tokens=facts.usage.output_tokens,
        prompt_hash=hashlib.blake2b(encoded, digest_size=16).hexdigest(),
    )


def read_prompt(asked: Mapping[str, Any]) -> str:
    """Return the last thing that was asked, as text."""
    messages = _messages(asked)
    last = messages[-1] if messages else None
    return _flatten(last.get("content") if isinstance(last, dict) else last)


def read_text(said: Mapping[str, Any]) -> str:
    """Return the answer's text: chat, completion or response; empty for embeddings and scores."""
    choices = said.get("choices")
    if isinstance(choices, list) and choices:
        message = choices[0].get("message") or {}
        return _flatten(message.get("content") or choices[0].get("text"))
    output = said.get("output")
    if isinstance(output, list):
        return "".join(_flatten(item.get("content")) for item in output if item.get("type") == "message")
    return ""


def _messages(asked: Mapping[str, Any]) -> list[Any]:
    messages = asked.get("messages") or asked.get("input") or asked.get("prompt") or asked.get("query")
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        return messages
    return [{"role": "user", "content": messages}] if messages else []


def _flatten(content: Any) -> str:
    """Return the text of a message's content: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(_flatten(part.get("text") if isinstance(part, dict) else part) for part in content)
    return "" if content is None else str(content)
