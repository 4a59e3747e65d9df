"""What a kill has cost, from the order in which lines reached the engine."""

from bench.killing import count_redone, most_per_kill
from bench.report import ORDER
from bench.scenarios import ONLY_BY_NAME, SCENARIOS


def test_lines_are_counted_against_the_kill_before_them() -> None:
    asked = ["a", "b", "c", "b", "c", "d", "d", "e"]
    assert count_redone(asked, [3, 6]) == [2, 1]


def test_a_line_that_is_sent_three_times_counts_at_each_kill() -> None:
    assert count_redone(["a", "a", "a"], [1, 2]) == [1, 1]


def test_a_kill_that_costs_nothing() -> None:
    assert count_redone(["a", "b"], [1]) == [0]
    assert count_redone(["a"], [1]) == [0]


def test_the_second_of_two_kills_in_a_row_may_pay_for_both() -> None:
    assert most_per_kill([100, 0, 141, 90]) == 115.5
    assert most_per_kill([7]) == 7
    assert most_per_kill([]) == 0


def test_kills_are_measured_by_name_only() -> None:
    assert {"kills", "kills-real"} <= ONLY_BY_NAME & set(SCENARIOS) & set(ORDER)
