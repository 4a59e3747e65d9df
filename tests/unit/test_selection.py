"""Which rows the rules of the curation choose."""

from typing import Any

import polars
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.candidates import draw
from vllm_batch_dagster.core.curation_rules import CurationRules, Filters, parse_rules
from vllm_batch_dagster.core.selection import REFUSED, choose, refusal

ROW: dict[str, Any] = {
    "line": 0,
    "answer": "an answer",
    "prompt": "a question",
    "finish_reason": "stop",
    "output_tokens": 5,
    "is_cut": False,
    "breaks_schema": False,
    "mean_logprob": None,
    "disagreement": None,
}
TYPES = {"mean_logprob": polars.Float64, "disagreement": polars.Float64}


def table(rows: list[dict[str, Any]], *seeds: int) -> polars.LazyFrame:
    """Rows whose custom_id is `id-<line>`, as core/candidates.py makes them."""
    whole = [
        ROW | {"line": line} | {f"draw_{seed}": draw(f"id-{line}", seed) for seed in seeds or (0,)} | row
        for line, row in enumerate(rows)
    ]
    return polars.LazyFrame(whole, schema_overrides=TYPES)


def review(*rules: dict[str, Any], cap: int = 1000) -> CurationRules:
    return parse_rules({"review": {"rules": list(rules), "cap": cap}})


def chosen(rows: polars.LazyFrame, rules: CurationRules) -> dict[int, tuple[list[str], float | None]]:
    found = choose(rows, rules.review).iter_rows(named=True)
    return {row["line"]: (row["rules"], row["score"]) for row in found}


@pytest.mark.parametrize(
    ("filters", "row", "reason"),
    [
        ({}, {}, None),
        ({}, {"answer": " \n"}, "no_text"),
        ({"finish_reasons": ["stop"]}, {"finish_reason": "length"}, "not_finished"),
        ({"finish_reasons": ["stop"]}, {"finish_reason": ""}, "not_finished"),
        ({}, {"finish_reason": "length"}, None),
        ({"min_output_tokens": 6}, {}, "too_short"),
        ({"min_output_tokens": 5, "max_output_tokens": 5}, {}, None),
        ({"max_output_tokens": 4}, {}, "too_long"),
        ({"max_output_tokens": 0}, {}, "too_long"),
        ({"min_characters": 10}, {}, "few_characters"),
        ({"max_characters": 8}, {}, "many_characters"),
        ({"max_characters": 2}, {"answer": "✓✓"}, None),
        ({"prompt_matches": "^A"}, {}, "prompt_matches"),
        ({"prompt_matches": "(?i)^A"}, {}, None),
        ({"prompt_lacks": "quest"}, {}, "prompt_lacks"),
        ({"answer_matches": r"\d"}, {}, "answer_matches"),
        ({"answer_lacks": "^an "}, {}, "answer_lacks"),
    ],
)
def test_filters(filters: dict[str, Any], row: dict[str, Any], reason: str | None) -> None:
    assert table([row]).select(refusal(Filters(**filters))).collect()[REFUSED].to_list() == [reason]


def test_a_random_sample_of_n_and_of_a_share() -> None:
    rows = table([{}] * 400, 0, 7)
    assert len(chosen(rows, review({"rule": "random", "n": 30}))) == 30
    one = chosen(rows, review({"rule": "random", "share": 0.25}))
    other = chosen(rows, review({"rule": "random", "share": 0.25, "seed": 7}))
    assert 60 < len(one) < 140
    assert one != other
    assert len(chosen(rows, review({"rule": "random", "share": 1}))) == 400
    assert set(chosen(rows, review({"rule": "random", "share": 0.5}))) > set(one)


@given(st.permutations(range(30)), st.integers(1, 30), st.integers(0, 3))
def test_a_sample_follows_from_the_ids_and_not_from_their_order(order: list[int], n: int, seed: int) -> None:
    rows = table([{}] * 30, seed).collect()
    shuffled = rows[order].lazy()
    rules = review({"rule": "random", "n": n, "seed": seed})
    assert chosen(rows.lazy(), rules) == chosen(shuffled, rules)


@given(st.sets(st.integers(0, 200), min_size=1), st.floats(0.01, 1))
def test_a_share_does_not_depend_on_the_other_lines(lines: set[int], share: float) -> None:
    rows, rules = table([{}] * 201), review({"rule": "random", "share": share})
    part = rows.filter(polars.col("line").is_in(list(lines)))
    assert set(chosen(part, rules)) == set(chosen(rows, rules)) & lines


def test_each_of_every_stratum() -> None:
    rows = table([{"stratum_0": name} for name in "aabbbc" * 10])
    picked = chosen(rows, review({"rule": "stratified", "by": "model", "each": 4}))
    names = ["aabbbc"[line % 6] for line in picked]
    assert {name: names.count(name) for name in "abc"} == {"a": 4, "b": 4, "c": 4}
    assert len(chosen(rows, review({"rule": "stratified", "by": "model", "each": 4, "n": 5}))) == 5


def test_the_worst_come_first_and_say_how_bad_they_are() -> None:
    values = [-0.1, None, -3.0, -1.5, -2.0]
    rows = table(
        [
            {"mean_logprob": value, "output_tokens": line, "disagreement": value and -value / 3}
            for line, value in enumerate(values)
        ]
    )
    low = {"rule": "low_logprob", "below": -1.0, "n": 2}
    assert chosen(rows, review(low)) == {2: (["low_logprob"], -3.0), 4: (["low_logprob"], -2.0)}
    assert chosen(rows, review({"rule": "long", "above": 2, "n": 1})) == {4: (["long"], 4.0)}
    assert set(chosen(rows, review({"rule": "disagreement", "least": 0.6}))) == {2, 4}


def test_flags() -> None:
    rows = table([{"is_cut": line == 1, "breaks_schema": line == 2} for line in range(4)])
    assert chosen(rows, review({"rule": "truncated"})) == {1: (["truncated"], None)}
    assert chosen(rows, review({"rule": "schema_failure", "name": "bad JSON"})) == {2: (["bad JSON"], None)}


def test_a_row_says_every_rule_that_chose_it_and_the_score_of_the_first() -> None:
    rows = table([{"mean_logprob": -2.0, "is_cut": True}, {}])
    rules = review({"rule": "truncated"}, {"rule": "low_logprob"}, {"rule": "random", "n": 2})
    assert chosen(rows, rules) == {0: (["truncated", "low_logprob", "random"], None), 1: (["random"], None)}
    turned = review({"rule": "low_logprob"}, {"rule": "truncated"})
    assert chosen(rows, turned) == {0: (["low_logprob", "truncated"], -2.0)}


def test_earlier_rules_win_where_the_cap_is_reached() -> None:
    rows = table([{"is_cut": line < 3} for line in range(50)])
    picked = chosen(rows, review({"rule": "truncated"}, {"rule": "random", "n": 50}, cap=5))
    assert len(picked) == 5
    assert {0, 1, 2} <= set(picked)
    assert chosen(rows, review({"rule": "random", "n": 5}, cap=0)) == {}
    assert chosen(rows, review()) == {}
