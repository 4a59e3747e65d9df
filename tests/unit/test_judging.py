"""What several reviews of one answer come to, by each rule."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.review_samples import review
from vllm_batch_dagster.core.judging import SKIPPED, TIED, WITHDRAWN, Judgement, ReviewRule, judge
from vllm_batch_dagster.core.reviewed import Review

LATEST, MAJORITY = ReviewRule.LATEST, ReviewRule.MAJORITY


def settled(versions: Sequence[Review], rule: ReviewRule = LATEST) -> Judgement:
    judged = judge(versions, rule)
    assert isinstance(judged, Judgement), judged
    return judged


def test_the_newest_version_of_an_annotation_counts() -> None:
    versions = [review(verdict="reject", minute=9), review(verdict="accept", minute=3)]
    assert settled(versions).review.verdict == "reject"
    assert settled(versions[::-1]).review.verdict == "reject"
    assert settled(versions).votes == 1


def test_latest_takes_the_newest_of_several_people() -> None:
    judged = settled(
        [review(verdict="accept", minute=5, by=1), review(annotation_id=2, verdict="edit", minute=6, by=2)]
    )
    assert (judged.review.verdict, judged.votes, judged.agreeing, judged.is_unanimous) == ("edit", 2, 1, False)


def test_majority_takes_what_most_people_said() -> None:
    people = [
        review(annotation_id=1, verdict="accept", minute=1, by=1, rating=3),
        review(annotation_id=2, verdict="accept", minute=2, by=2, rating=5),
        review(annotation_id=3, verdict="reject", minute=3, by=3),
    ]
    judged = settled(people, MAJORITY)
    assert (judged.review.verdict, judged.review.rating, judged.votes, judged.agreeing) == ("accept", 5, 3, 2)
    assert settled(people, LATEST).review.verdict == "reject"
    assert judge([people[0], people[2]], MAJORITY) == TIED


def test_one_person_has_one_voice() -> None:
    """Two annotations of one person do not outvote another."""
    versions = [
        review(annotation_id=1, verdict="accept", minute=1, by=1),
        review(annotation_id=2, verdict="accept", minute=2, by=1),
        review(annotation_id=3, verdict="reject", minute=3, by=2),
    ]
    assert judge(versions, MAJORITY) == TIED


def test_skipped_says_nothing_beside_a_finished_one() -> None:
    skipped = review(annotation_id=2, skipped=True, minute=9, by=2)
    assert settled([review(verdict="accept"), skipped]).votes == 1
    assert judge([skipped], LATEST) == SKIPPED


@pytest.mark.parametrize("rule", list(ReviewRule))
def test_a_withdrawn_annotation_does_not_count(rule: ReviewRule) -> None:
    gone = review(verdict="reject", minute=8, changes={"state": "withdrawn"})
    assert judge([review(verdict="reject", minute=8), gone], rule) == WITHDRAWN
    other = review(annotation_id=2, verdict="accept", by=2)
    assert settled([review(verdict="reject"), gone, other], rule).review.verdict == "accept"


def test_reviews_of_an_older_answer_do_not_count() -> None:
    old = review(answers=("old",), verdict="accept", minute=1, by=1)
    new = review(answers=("new",), annotation_id=2, verdict="reject", minute=2, by=2)
    judged = settled([old, new], MAJORITY)
    assert (judged.review.answer, judged.votes) == ("new", 1)


_REVIEWS = st.lists(
    st.builds(
        review,
        annotation_id=st.integers(1, 4),
        minute=st.integers(1, 9),
        by=st.integers(1, 3),
        verdict=st.sampled_from(["accept", "edit", "reject"]),
        skipped=st.booleans(),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda each: each.version,
)


@given(versions=_REVIEWS, rule=st.sampled_from(list(ReviewRule)), data=st.data())
def test_order_and_repetition_change_nothing(versions: list[Review], rule: ReviewRule, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations([*versions, *versions]))
    assert judge(shuffled, rule) == judge(versions, rule)
