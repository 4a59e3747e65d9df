"""Counts the reviews that were pulled: how many, what they say, and how far people agree. For the UI and the terminal.

One pass over the rows, a few thousand lines at a time.
"""

from collections import Counter
from dataclasses import dataclass, field

from vllm_batch_dagster.core.judging import ReviewRule, judge, newest_versions
from vllm_batch_dagster.core.reviewed import ReviewState
from vllm_batch_dagster.stages.review_rows import ReviewRows


@dataclass(slots=True)
class ReviewCounts:
    """`versions` of annotations are kept, `annotations` stand, `by_state`; `items` are answers, `by_verdict` what their
    reviews come to, or why to nothing. Of the `shared` items, which several people reviewed, `agreed` have one verdict
    only."""

    versions: int = 0
    annotations: int = 0
    items: int = 0
    by_state: Counter[str] = field(default_factory=Counter)
    by_verdict: Counter[str] = field(default_factory=Counter)
    by_rating: Counter[str] = field(default_factory=Counter)
    shared: int = 0
    agreed: int = 0


def count_reviews(rows: ReviewRows, rule: ReviewRule) -> ReviewCounts:
    counts = ReviewCounts()
    for versions in rows.histories():
        newest = newest_versions(versions)
        counts.versions += len(versions)
        counts.annotations += sum(each.state != ReviewState.WITHDRAWN for each in newest)
        counts.by_state.update(each.state for each in newest)
        counts.items += 1
        judged = judge(versions, rule)
        if isinstance(judged, str):
            counts.by_verdict[judged] += 1
            continue
        counts.by_verdict[judged.review.verdict or "no_verdict"] += 1
        counts.by_rating[str(judged.review.rating or "none")] += 1
        counts.shared += judged.votes > 1
        counts.agreed += judged.votes > 1 and judged.is_unanimous
    return counts
