"""What is read of request bodies of every endpoint, and that nothing a user can send breaks the reader."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.prompts import Prompts, read_line, read_prompts


def read(**fields: Any) -> Prompts:
    prompts = read_prompts(msgspec.json.encode(fields))
    assert prompts is not None
    return prompts


@pytest.mark.parametrize(
    ("fields", "texts", "counts"),
    [
        ({"prompt": "a b"}, ("a b",), ()),
        ({"prompt": ["a", "b"]}, ("a", "b"), ()),
        ({"prompt": [1, 2, 3]}, (), (3,)),
        ({"prompt": [[1, 2], [3]]}, (), (2, 1)),
        ({"input": ["a", "b"]}, ("a", "b"), ()),
        ({"input": "a"}, ("a",), ()),
        ({"text_1": "q", "text_2": ["a", "b"]}, ("q", "a", "b"), ()),
        ({"query": "q", "documents": ["a", "b"]}, ("q", "a", "b"), ()),
        ({"prompt": []}, (), ()),
        ({"prompt": None}, (), ()),
    ],
)
def test_texts_and_token_ids(fields: dict[str, Any], texts: tuple[str, ...], counts: tuple[int, ...]) -> None:
    prompts = read(**fields)
    assert (prompts.texts, prompts.id_counts, prompts.messages) == (texts, counts, ())


def test_parts_of_a_message_are_joined_and_pictures_are_noted() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": "b"},
    ]
    prompts = read(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": parts}])
    assert [message["content"] for message in prompts.messages] == ["s", "a\nb"]
    assert prompts.has_media
    assert not read(messages=[{"role": "user", "content": parts[:1]}]).has_media


def test_responses_become_a_conversation() -> None:
    assert read(input="hello").texts == ("hello",)
    prompts = read(instructions="be short", input="hello")
    assert [(message["role"], message["content"]) for message in prompts.messages] == [
        ("system", "be short"),
        ("user", "hello"),
    ]
    items = read(input=[{"role": "user", "content": "hello"}])
    assert (items.texts, len(items.messages)) == ((), 1)


def test_limits_and_truncation() -> None:
    assert read(prompt="a").max_tokens is None
    assert read(prompt="a", max_tokens=7).max_tokens == 7
    assert read(prompt="a", max_tokens=7, max_completion_tokens=9).max_tokens == 9
    assert read(input="a", truncate_prompt_tokens=-1).is_truncated


@pytest.mark.parametrize("raw", [b"", b"[]", b"1e999", b'{"a":1e999}', b"\xff", b'{"a":' * 5000, b'"x"'])
def test_what_cannot_be_read_is_none(raw: bytes) -> None:
    assert read_prompts(raw) is None
    assert read_line(raw) is None


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
    max_leaves=8,
)
names = st.sampled_from(["messages", "input", "prompt", "instructions", "text_1", "documents", "max_tokens", "tools"])


@given(st.dictionaries(names, values, max_size=4))
def test_no_body_breaks_the_reader(fields: dict[str, Any]) -> None:
    prompts = read(**fields)
    assert all(isinstance(message["content"], str) for message in prompts.messages)


def test_a_line_tells_its_id_model_and_body() -> None:
    line = read_line(b'{"custom_id":"a","url":7,"body":{"model":"m", "x" : 1}}')
    assert line is not None
    assert (line.custom_id, line.model, line.body) == ("a", "m", b'{"model":"m", "x" : 1}')
