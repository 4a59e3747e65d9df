"""What the rules of the curation judge an answered line by."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.candidates import (
    CandidateMaker,
    Line,
    bucket,
    disagreement,
    draw,
    follow_path,
    mean_logprob,
    schema,
)
from vllm_batch_dagster.core.curation_rules import parse_rules

TOKENS = [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -3.0}]


def candidate(asked: dict[str, Any], said: dict[str, Any], *rules: dict[str, Any], **metadata: str) -> dict[str, Any]:
    maker = CandidateMaker(parse_rules({"review": {"rules": list(rules)}}), metadata)
    return maker.make(Line("batch_1", 4, "id-4", msgspec.json.encode(asked), msgspec.json.encode(said)))


@pytest.mark.parametrize(
    ("said", "mean"),
    [
        ({"choices": [{"logprobs": {"content": TOKENS}}]}, -2.0),
        ({"choices": [{"logprobs": {"token_logprobs": [None, -1.0, -2.0]}}]}, -1.5),
        ({"output": [{"type": "reasoning"}, {"content": [{"logprobs": TOKENS}]}]}, -2.0),
        ({"choices": [{"logprobs": None}]}, None),
        ({"choices": [{"logprobs": {"content": []}}]}, None),
        ({"data": [{"embedding": [0.5]}]}, None),
        ({"choices": "odd"}, None),
    ],
)
def test_the_mean_log_probability_of_each_kind_of_answer(said: dict[str, Any], mean: float | None) -> None:
    assert mean_logprob(msgspec.json.encode(said)) == mean


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        (["one"], None),
        (["Paris.", " paris ", "**Paris**"], pytest.approx(1 / 3)),
        (["a  b", "A B", "b a", "c"], 0.75),
        (["a", "b"], 1.0),
    ],
)
def test_disagreement(answers: list[str], share: Any) -> None:
    assert disagreement(answers) == share


def test_every_choice_is_an_answer() -> None:
    choices = [{"message": {"content": text}, "finish_reason": "length"} for text in ("x", "y")]
    row = candidate({"model": "tiny", "prompt": "?"}, {"choices": choices})
    assert (row["answers"], row["answer"], row["disagreement"], row["is_cut"]) == (["x", "y"], "x", 1.0, True)


@pytest.mark.parametrize(
    ("by", "value"),
    [
        ("model", "tiny"),
        ("finish_reason", "stop"),
        ("length", "33-128"),
        ("metadata.topic", "sums"),
        ("metadata.team", "blue"),
        ("metadata.nothing", "none"),
        ("$.messages[0].role", "system"),
        ("$.messages[-1].content", "?"),
        ("$.temperature", "0.5"),
        ("$.tools[3].name", "none"),
        ("$.model.name", "none"),
    ],
)
def test_strata(by: str, value: str) -> None:
    messages = [{"role": "system", "content": "!"}, {"role": "user", "content": "?"}]
    asked = {"model": "tiny", "messages": messages, "temperature": 0.5, "metadata": {"topic": "sums"}}
    said = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 40}}
    row = candidate(asked, said, {"rule": "stratified", "by": by, "each": 1}, team="blue", topic="not this one")
    assert row["stratum_0"] == value


@pytest.mark.parametrize(("tokens", "name"), [(0, "0-32"), (32, "0-32"), (33, "33-64"), (65, "65-")])
def test_buckets(tokens: int, name: str) -> None:
    assert bucket(tokens, (64, 32)) == name


def test_the_columns_are_those_of_the_schema() -> None:
    rules = [{"rule": "stratified", "by": "model", "each": 1, "seed": 3}, {"rule": "random", "n": 1}]
    row = candidate({"model": "tiny"}, {"choices": []}, *rules)
    assert list(row) == list(schema(parse_rules({"review": {"rules": rules}})))


@given(st.text(), st.integers(0, 1000))
def test_a_draw_follows_from_the_id_and_the_seed(custom_id: str, seed: int) -> None:
    assert draw(custom_id, seed) == draw(custom_id, seed)
    assert 0 <= draw(custom_id, seed) < 1 << 63
    assert draw(custom_id, seed) != draw(custom_id + "x", seed)
    assert draw(custom_id, seed) != draw(custom_id, seed + 1)


@given(
    st.recursive(
        st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_a_path_never_fails(value: Any) -> None:
    assert isinstance(follow_path(value, "$.messages[0].role"), str)
