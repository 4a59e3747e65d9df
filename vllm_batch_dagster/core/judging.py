"""What all reviews of one answer come to. Called by whoever uses reviews: training set, gold set, export. Pure.

The rules, in this order: an annotation counts with its newest version, and not at all once it is withdrawn; skipped
ones say nothing; when a line was answered anew, only reviews of the newest reviewed answer count; of one person, the
newest annotation counts. Several people are then settled by `latest` (the newest annotation) or `majority` (the verdict
that most of them gave, in the words of the newest who gave it; a tie settles nothing).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_batch_dagster.core.reviewed import Review, ReviewState

SKIPPED, WITHDRAWN, TIED = "skipped", "withdrawn", "reviewers_disagree"


class ReviewRule(StrEnum):
    """How several reviewers of one answer are settled."""

    LATEST = "latest"
    MAJORITY = "majority"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The review that stands for all. `votes` people reviewed the answer, `agreeing` of them gave this verdict."""

    review: Review
    votes: int
    agreeing: int

    @property
    def is_unanimous(self) -> bool:
        return self.votes == self.agreeing


def judge(versions: Sequence[Review], rule: ReviewRule) -> Judgement | str:
    """Settle all versions of all annotations of one line; a text is the reason why nothing is settled."""
    present = [each for each in newest_versions(versions) if each.state != ReviewState.WITHDRAWN]
    finished = [each for each in present if each.state == ReviewState.FINISHED]
    if not finished:
        return SKIPPED if present else WITHDRAWN
    answer = max(finished, key=_age).answer_hash
    voices = _last_words(each for each in finished if each.answer_hash == answer)
    chosen = max(voices, key=_age) if rule is ReviewRule.LATEST else _majority(voices)
    if chosen is None:
        return TIED
    return Judgement(chosen, len(voices), sum(each.verdict == chosen.verdict for each in voices))


def newest_versions(versions: Iterable[Review]) -> Sequence[Review]:
    """Return the newest version of each annotation, oldest first. Versions that came twice count once."""
    newest: dict[tuple[str, int], Review] = {}
    for each in sorted(versions, key=_order):
        newest[each.source, each.annotation_id] = each
    return sorted(newest.values(), key=_age)


def _last_words(reviews: Iterable[Review]) -> Sequence[Review]:
    """Return the newest review of each person, oldest first."""
    by_person: dict[tuple[str, str], Review] = {}
    for each in sorted(reviews, key=_age):
        by_person[each.source, each.annotator] = each
    return sorted(by_person.values(), key=_age)


def _majority(voices: Sequence[Review]) -> Review | None:
    (verdict, most), *others = Counter(each.verdict for each in voices).most_common()
    if others and others[0][1] == most:
        return None
    return max((each for each in voices if each.verdict == verdict), key=_age)


def _age(review: Review) -> tuple[str, int]:
    return review.updated_at, review.annotation_id


def _order(review: Review) -> tuple[str, int]:
    # A deletion has the time of its task, which may be that of the annotation's last change.
    return review.updated_at, int(review.state == ReviewState.WITHDRAWN)
