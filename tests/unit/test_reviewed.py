"""What an annotation says, read from the server's words: whatever these are."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.review_samples import SOURCE, annotation, review, task
from vllm_batch_dagster.core.review import VERDICTS
from vllm_batch_dagster.core.reviewed import AnnotatedTask, Asked, ReviewState, is_ours, read_review, read_time


def test_an_annotation_is_read() -> None:
    read = review(
        2,
        answers=("a", "b"),
        verdict="edit",
        rating=4,
        issues=["format", "factual"],
        correction="c",
        preference="B",
        by=7,
        minute=5,
    )
    assert (read.verdict, read.rating, read.issues, read.correction) == ("edit", 4, ["format", "factual"], "c")
    assert (read.preference, read.answers, read.answer) == (1, ["a", "b"], "a")
    assert (read.annotator, read.lead_seconds, read.state) == ("7", 3.5, ReviewState.FINISHED)
    assert read.version == (SOURCE, "batch_1/id-2", 1, "2026-11-26T02:05:00.000000Z")


def test_a_skipped_one_says_so() -> None:
    read = review(skipped=True)
    assert (read.state, read.verdict, read.rating, read.preference) == (ReviewState.SKIPPED, "", 0, -1)


def test_times_sort_as_text() -> None:
    """Django leaves the fraction out when it is 0."""
    assert read_time("2026-11-26T02:37:11Z") == "2026-11-26T02:37:11.000000Z"
    assert read_time("2026-11-26T03:37:11.3+01:00") == "2026-11-26T02:37:11.300000Z"
    assert read_time("2026-11-26T02:37:11Z") < read_time("2026-11-26T02:37:11.308487Z")


@pytest.mark.parametrize(
    "answers",
    [
        {"verdict": "perhaps"},
        {"rating": 9},
        {"rating": True},
        {"rating": "5"},
        {"preference": "C"},
        {"correction": [None]},
        {"verdict": [{"accept": 1}]},
    ],
)
def test_values_that_do_not_fit_count_as_not_answered(answers: dict[str, Any]) -> None:
    """The server checks none of them (it takes rating 9 of 5)."""
    read = review(answers=("a", "b"), **answers)
    assert (read.verdict, read.rating, read.correction, read.preference) == ("", 0, "", -1)


def test_a_task_of_others_is_none_of_ours() -> None:
    assert is_ours(task())
    assert not is_ours(AnnotatedTask(1, {"text": "a task by hand"}, [annotation()], "2026-11-26T02:00:00Z"))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_NAMES = st.sampled_from(["verdict", "rating", "correction", "preference", "issues", "other"])
_VALUES = st.dictionaries(st.sampled_from(["choices", "text", "rating", "x"]), _JSON, max_size=3) | _JSON
_ENTRIES = st.fixed_dictionaries({"from_name": _NAMES, "value": _VALUES}) | _JSON


@given(result=st.lists(_ENTRIES, max_size=6) | _JSON)
def test_any_result_is_read_into_known_values(result: Any) -> None:
    read = read_review(SOURCE, task(answers=("a", "b")), {**annotation(), "result": result}, Asked())
    assert read.verdict in ("", *VERDICTS)
    assert 0 <= read.rating <= 5
    assert -1 <= read.preference < 2
    assert isinstance(read.correction, str)
