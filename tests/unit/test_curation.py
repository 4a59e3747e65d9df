"""Rows of the curated set: what of a request and its answer becomes text."""

import hashlib
from typing import Any

import msgspec
import pytest

from vllm_batch_dagster.core.curation import CuratedRow, make_row, read_prompt, read_text


def row_of(asked: dict[str, Any], said: dict[str, Any]) -> CuratedRow:
    return make_row("batch_1", 7, "id-7", msgspec.json.encode(asked), msgspec.json.encode(said))


def test_a_chat_answer_as_a_row() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi ✓"}]
    said = {
        "model": "tiny-1",
        "choices": [{"finish_reason": "stop", "message": {"content": "Hello."}}, {"finish_reason": "length"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3},
    }
    row = row_of({"model": "tiny", "messages": messages}, said)
    assert row == CuratedRow(
        batch_id="batch_1",
        line=7,
        custom_id="id-7",
        model="tiny-1",
        prompt="Hi ✓",
        messages=msgspec.json.encode(messages).decode(),
        answer="Hello.",
        finish_reason="stop",
        input_tokens=9,
        output_tokens=3,
        prompt_hash=hashlib.blake2b(msgspec.json.encode(messages), digest_size=16).hexdigest(),
    )


def test_the_model_is_the_requests_when_the_answer_does_not_say() -> None:
    assert row_of({"model": "tiny", "prompt": "x"}, {"choices": []}).model == "tiny"
    assert row_of({"prompt": "x"}, {}).model == ""


def test_only_equal_conversations_have_equal_hashes() -> None:
    def hash_of(*contents: str) -> str:
        return row_of({"messages": [{"role": "user", "content": content} for content in contents]}, {}).prompt_hash

    assert hash_of("a", "b") == hash_of("a", "b")
    assert len({hash_of("a", "b"), hash_of("c", "b"), hash_of("b")}) == 3


@pytest.mark.parametrize(
    ("asked", "prompt"),
    [
        (
            {"messages": [{"content": [{"type": "text", "text": "look"}, {"type": "text", "text": "here"}]}]},
            "look here",
        ),
        ({"messages": [{"role": "user", "content": None}]}, ""),
        ({"messages": [{"role": "user", "content": "x"}, "not a message"]}, "not a message"),
        ({"prompt": "once upon"}, "once upon"),
        ({"prompt": ["one", "two"]}, "one two"),
        ({"prompt": [1, 2]}, "1 2"),
        ({"input": "embed me"}, "embed me"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "respond"}]}]}, "respond"),
        ({"query": "which is best?", "documents": ["a", "b"]}, "which is best?"),
        ({}, ""),
    ],
)
def test_the_prompt_is_the_last_thing_asked(asked: dict[str, Any], prompt: str) -> None:
    assert read_prompt(asked) == prompt
    assert row_of(asked, {}).prompt == prompt


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"choices": [{"message": {"content": "chat"}}]}, "chat"),
        ({"choices": [{"message": {"content": None, "tool_calls": [{}]}}]}, ""),
        ({"choices": [{"text": "completion"}]}, "completion"),
        ({"output": [{"type": "reasoning"}, {"type": "message", "content": [{"text": "response"}]}]}, "response"),
        ({"data": [{"embedding": [0.1]}]}, ""),
        ({"results": []}, ""),
    ],
)
def test_the_text_of_each_kind_of_answer(said: dict[str, Any], text: str) -> None:
    assert read_text(said) == text
