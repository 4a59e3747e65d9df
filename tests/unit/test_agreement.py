"""The measures of agreement: known values, and what must hold of any two texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.agreement import BINS, Spread, compare, draw_spread


def test_texts_that_differ_only_in_case_and_space_are_equal() -> None:
    scores = compare(" The  Capital\nis Paris.", "the capital is paris.")
    assert (scores.exact, scores.token_f1, scores.chrf) == (1.0, 1.0, 1.0)


def test_token_f1_by_hand() -> None:
    """Three of four words said, three of five wanted: 2 * 3/4 * 3/5 / (3/4 + 3/5)."""
    assert compare("a b c x", "a b c y z").token_f1 == pytest.approx(2 / 3)


def test_chrf_by_hand() -> None:
    """Characters 2 of 3 and 2 of 3, pairs 1 of 2 and 1 of 2, triples none: their mean."""
    assert compare("abc", "abd").chrf == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_chrf_weighs_recall() -> None:
    assert compare("abcdef", "abcdefghi").chrf < compare("abcdefghi", "abcdef").chrf


def test_nothing_in_common() -> None:
    scores = compare("x", "y")
    assert (scores.exact, scores.token_f1, scores.chrf) == (0.0, 0.0, 0.0)


@given(one=st.text(max_size=40), other=st.text(max_size=40))
def test_bounds_and_symmetry(one: str, other: str) -> None:
    scores, turned = compare(one, other), compare(other, one)
    for value in (scores.exact, scores.token_f1, scores.chrf):
        assert 0.0 <= value <= 1.0
    assert scores.token_f1 == pytest.approx(turned.token_f1)
    assert scores.exact == turned.exact
    assert compare(one, one).token_f1 == 1.0
    assert scores.exact <= min(scores.token_f1, scores.chrf)


@given(values=st.lists(st.floats(0, 1), max_size=50))
def test_a_spread_counts_every_score(values: list[float]) -> None:
    spread = Spread()
    for value in values:
        spread.add(value)
    assert sum(spread.bins) == spread.count == len(values)
    assert len(spread.bins) == BINS
    assert spread.mean == pytest.approx(sum(values) / len(values) if values else 0.0)


def test_the_drawing() -> None:
    lines = draw_spread([0, 1, 4] + [0] * 7, width=4).splitlines()
    assert lines[:3] == ["0.0 to 0.1  0", "0.1 to 0.2  █ 1", "0.2 to 0.3  ████ 4"]
    assert len(lines) == BINS
