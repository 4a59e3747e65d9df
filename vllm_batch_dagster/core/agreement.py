"""How far a model's answer agrees with the one that people want: three measures from 0 to 1, and their spread. Pure.

    exact      the texts are equal after case folding and with runs of white space as one space
    token_f1   harmonic mean of precision and recall over words (runs of letters and digits, each as often as it comes):
               the measure of SQuAD (Rajpurkar et al. 2016), without its removal of English articles
    chrf       F-score with beta 2, averaged over character n-grams of 1 to 6 without white space (Popović 2015)

Called by stages/regression.py. `agreement` of a set is the mean token_f1; a prompt without an answer counts 0.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\w+")
_ORDERS = range(1, 7)
_BETA_SQUARED = 4
# Longer texts are compared by their beginning: the measures are of the length of the texts, and an answer that runs
# away must not hold the report up.
MOST_CHARACTERS = 20_000
BINS = 10
_BAR = "█"


@dataclass(frozen=True, slots=True)
class Scores:
    """The measures of one answer."""

    exact: float
    token_f1: float
    chrf: float


NO_ANSWER = Scores(0.0, 0.0, 0.0)


def compare(answer: str, expected: str) -> Scores:
    """Measure an answer against the expected one. Two texts without a word agree when they are equal."""
    said, wanted = _normalise(answer), _normalise(expected)
    if said == wanted:
        return Scores(1.0, 1.0, 1.0)
    return Scores(0.0, _token_f1(said, wanted), _chrf(said, wanted))


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text[:MOST_CHARACTERS]).casefold().split())


def _token_f1(said: str, wanted: str) -> float:
    return _f_score(Counter(_WORD.findall(said)), Counter(_WORD.findall(wanted)), 1)


def _chrf(said: str, wanted: str) -> float:
    left, right = said.replace(" ", ""), wanted.replace(" ", "")
    scores = [
        _f_score(_grams(left, order), _grams(right, order), _BETA_SQUARED)
        for order in _ORDERS
        if len(left) >= order or len(right) >= order
    ]
    return sum(scores) / len(scores) if scores else 0.0


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[at : at + order] for at in range(len(text) - order + 1))


def _f_score(said: Counter[str], wanted: Counter[str], beta_squared: float) -> float:
    common = (said & wanted).total()
    if not common:
        return 0.0
    precision, recall = common / said.total(), common / wanted.total()
    return (1 + beta_squared) * precision * recall / (beta_squared * precision + recall)


class Spread:
    """Scores as they come: their number, mean, and how many fall into each tenth."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._bins = [0] * BINS

    def add(self, score: float) -> None:
        self.count += 1
        self._sum += score
        self._bins[min(int(score * BINS), BINS - 1)] += 1

    @property
    def mean(self) -> float:
        return self._sum / self.count if self.count else 0.0

    @property
    def bins(self) -> Sequence[int]:
        """Counts for 0.0 to 0.1, 0.1 to 0.2, ...; a score of 1 is in the last one."""
        return tuple(self._bins)


def draw_spread(bins: Sequence[int], width: int = 32) -> str:
    """Return the counts of a spread as text lines with bars."""
    most = max(bins, default=0)
    rows = []
    for at, count in enumerate(bins):
        bar = _BAR * max(1, round(width * count / most)) + " " if count else ""
        rows.append(f"{at / BINS:.1f} to {(at + 1) / BINS:.1f}  {bar}{count}")
    return "\n".join(rows)
