"""The figures of the measuring program: medians, spread, targets."""

import pytest

from bench.figures import Figure, Target, collect, format_number


def test_a_figure_is_the_median_with_its_spread() -> None:
    figure = Figure("wall", "s", (9.0, 1.0, 2.0))
    assert (figure.median, figure.low, figure.high) == (2.0, 1.0, 9.0)


def test_an_even_number_of_repetitions_gives_the_middle_of_two() -> None:
    assert Figure("wall", "s", (1.0, 4.0, 2.0, 10.0)).median == 3.0


def test_a_figure_without_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="'wall' has no value"):
        Figure("wall", "s", ())


@pytest.mark.parametrize(
    ("target", "values", "is_met"),
    [
        (Target(1.1), (1.0, 1.1, 9.0), True),
        (Target(1.1), (1.0, 1.2, 1.3), False),
        (Target(1.0, at_least=True), (1.0,), True),
        (Target(1.0, at_least=True), (0.0,), False),
        (None, (5.0,), None),
    ],
)
def test_a_target_holds_for_the_median(target: Target | None, values: tuple[float, ...], is_met: bool | None) -> None:
    assert Figure("x", "s", values, target).is_met is is_met


def test_collect_takes_one_value_from_each_repetition() -> None:
    assert collect("wall", "s", [{"a": 1, "b": 5}, {"a": 2.5, "b": 6}], "a").values == (1.0, 2.5)


def test_data_holds_every_value_and_the_verdict() -> None:
    data = Figure("ratio", "x", (1.0, 3.0, 2.0), Target(1.5)).as_data()
    assert data == {
        "name": "ratio",
        "unit": "x",
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
        "values": [1.0, 3.0, 2.0],
        "target": {"words": "at most 1.50", "limit": 1.5, "met": False},
    }


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (3.0, "3"), (0.854, "0.85"), (12.34, "12.3"), (-0.5, "-0.50"), (1234.5, "1234")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text
