"""Repair rounds as rules: what the metadata may say, which answer is flawed, and what is asked instead."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.creation import read_batch_params
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.repair import (
    Format,
    RepairPlan,
    enlarge,
    is_cut,
    read_plan,
    reseed,
    said_texts,
    wanted_format,
)
from vllm_batch_dagster.stages.schemas import SchemaChecker

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}


def raw(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("metadata", "plan"),
    [
        (None, RepairPlan()),
        ({"team": "docs"}, RepairPlan()),
        ({"repair_schema": "2"}, RepairPlan(rounds=2)),
        ({"repair_length": "4096"}, RepairPlan(tokens=4096)),
        ({"repair_length": "1.5x", "repair_schema": "1"}, RepairPlan(rounds=1, factor=1.5)),
    ],
)
def test_what_the_metadata_asks_for(metadata: dict[str, str] | None, plan: RepairPlan) -> None:
    assert read_plan(metadata) == plan


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("repair_schema", value) for value in ("", "0", "6", "-1", "two", "1.5", "2 ", "٢", "9" * 400)),
        *(("repair_length", value) for value in ("", "0", "-5", "1x", "0.5x", "x", "101x", "4096 ", "1e3", "2X")),
    ],
)
def test_a_value_that_means_nothing_is_refused_at_creation(key: str, value: str) -> None:
    params = {
        "input_file_id": "file-1",
        "endpoint": CHAT,
        "completion_window": "24h",
        "metadata": {key: value},
    }
    with pytest.raises(InvalidInput, match=f"Invalid 'metadata.{key}': expected") as refused:
        read_batch_params(params)
    assert (refused.value.param, refused.value.code) == (f"metadata.{key}", "invalid_value")


def test_the_format_of_each_endpoint() -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    flat = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    wanted = Format(json.dumps(SCHEMA).encode())
    assert wanted_format(CHAT, raw(response_format=asked)) == wanted
    assert wanted_format(RESPONSES, raw(text=flat)) == wanted
    assert wanted_format(CHAT, raw(response_format={"type": "json_object"})) == Format()
    assert wanted_format(CHAT, raw(response_format={"type": "text"})) is None
    assert wanted_format(CHAT, raw(response_format=3)) is None
    assert wanted_format(RESPONSES, raw(response_format=asked)) is None
    assert wanted_format(CHAT, raw()) is None


def test_the_texts_of_an_answer() -> None:
    chat = raw(choices=[{"message": {"content": "a"}}, {"message": {"content": None, "tool_calls": [1]}}])
    parts = [{"type": "output_text", "text": "b"}, {"type": "refusal", "refusal": "no"}]
    assert said_texts(chat) == ["a"]
    assert said_texts(raw(choices=[{"text": "c"}])) == ["c"]
    assert said_texts(raw(output=[{"type": "reasoning"}, {"type": "message", "content": parts}])) == ["b"]
    assert said_texts(b"nothing") == []


def test_what_was_cut() -> None:
    assert is_cut(raw(choices=[{"finish_reason": "stop"}, {"finish_reason": "length"}]))
    assert is_cut(raw(status="incomplete", incomplete_details={"reason": "max_output_tokens"}))
    assert not is_cut(raw(status="incomplete", incomplete_details={"reason": "content_filter"}))
    assert not is_cut(raw(choices=[{"finish_reason": "stop"}]))


@pytest.mark.parametrize(
    ("endpoint", "body", "plan", "longest", "larger"),
    [
        (CHAT, {"max_tokens": 16}, RepairPlan(tokens=64), None, {"max_tokens": 64}),
        (CHAT, {"max_tokens": 16}, RepairPlan(factor=1.5), None, {"max_tokens": 24}),
        (
            CHAT,
            {"max_tokens": 9, "max_completion_tokens": 8},
            RepairPlan(factor=2),
            None,
            {"max_completion_tokens": 16},
        ),
        (RESPONSES, {"max_output_tokens": 16}, RepairPlan(tokens=64), None, {"max_output_tokens": 64}),
        (COMPLETIONS, {}, RepairPlan(factor=2), None, {"max_tokens": 32}),
        (CHAT, {"max_tokens": 16}, RepairPlan(tokens=64), 50, {"max_tokens": 40}),
        (CHAT, {"max_tokens": 40}, RepairPlan(tokens=64), 50, None),
        (CHAT, {"max_tokens": 64}, RepairPlan(tokens=64), None, None),
        (CHAT, {"max_tokens": 100}, RepairPlan(tokens=64), None, None),
        (CHAT, {}, RepairPlan(tokens=64), None, None),
        ("/v1/embeddings", {"max_tokens": 5}, RepairPlan(tokens=64), None, None),
    ],
)
def test_a_larger_budget_or_none(
    endpoint: str, body: dict[str, int], plan: RepairPlan, longest: int | None, larger: dict[str, int] | None
) -> None:
    """The prompt has ten tokens."""
    made = enlarge(endpoint, raw(model="m", **body), plan, 10, longest)
    assert (made and json.loads(made)) == (larger and {"model": "m", **body, **larger})


def test_only_the_budget_and_the_seed_differ() -> None:
    odd = b'{"model" : "m","x":1e0,"big":123456789012345678901234567890, "t":"caf\\u00e9","max_tokens":3}'
    made = enlarge(CHAT, odd, RepairPlan(tokens=9), 1, None)
    assert made == b'{"model":"m","x":1e0,"big":123456789012345678901234567890,"t":"caf\\u00e9","max_tokens":9}'
    assert reseed(made, 2) == made[:-1] + b',"seed":2}'


def test_another_seed_unless_a_repeat_gives_the_same() -> None:
    assert json.loads(reseed(raw(seed=40), 2) or b"")["seed"] == 42
    assert reseed(raw(temperature=0), 1) is None
    assert reseed(raw(temperature=0.0, seed=5), 1) is None
    assert reseed(raw(temperature=0.1), 1) is not None


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(0, 5000), st.none() | st.integers(1, 12_000))
def test_never_the_same_budget_and_never_beyond_the_context(
    old: int, tokens: int, prompt: int, longest: int | None
) -> None:
    made = enlarge(CHAT, raw(max_tokens=old), RepairPlan(tokens=tokens), prompt, longest)
    if made is not None:
        assert json.loads(made)["max_tokens"] > old
        assert longest is None or json.loads(made)["max_tokens"] + prompt <= longest


def test_answers_against_schemas() -> None:
    checker, wanted = SchemaChecker(), Format(json.dumps(SCHEMA).encode())
    assert checker.fits('{"a":1}', wanted)
    assert not checker.fits('{"a":"1"}', wanted)
    assert not checker.fits('{"a":1', wanted)
    assert checker.fits("{}", Format())
    assert not checker.fits("[1]", Format())


def test_a_schema_that_is_none_condemns_nothing() -> None:
    checker = SchemaChecker()
    for schema in (b"3", b'{"type":12}', b'{"$ref":"http://127.0.0.1:9/x"}', b'{"pattern":"("}', b"{torn"):
        assert checker.fits('"x"', Format(schema)), schema


def test_a_pattern_that_explodes_ends() -> None:
    evil = Format(json.dumps({"type": "string", "pattern": r"^(?=a)((a+)+)+\1$"}).encode())
    SchemaChecker().fits(json.dumps("a" * 20_000 + "!"), evil)


def test_compiled_schemas_are_bounded() -> None:
    checker = SchemaChecker()
    for number in range(500):
        assert checker.fits(str(number), Format(b'{"const":%d}' % number))
    assert len(checker._compiled) <= 64
