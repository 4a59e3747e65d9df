"""Bisection of the lines that were in flight when the engine died: every poison line is found, and no other."""

import math
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.poison import MOST_BARREN, Suspicion


class Driver:
    """A run in miniature: `window` workers, an engine that dies when it comes to a poison line, in a random order."""

    def __init__(self, lines: int, window: int, poison: set[int], chance: random.Random) -> None:
        self.suspicion, self.chance = Suspicion(), chance
        self.window, self.poison = window, poison
        self.left = list(range(lines))
        self.held: set[int] = set()
        self.answered: Counter[int] = Counter()
        self.isolated: Counter[int] = Counter()
        self.aside: set[int] = set()
        self.deaths = self.barren = self.most_barren = 0
        self.outside_deaths: list[int] = []
        self.sent: Counter[int] = Counter()

    def run(self) -> None:
        while self.left or self.held:
            self._fill()
            suspects = {line for line in self.held if self.suspicion.is_suspect(line)}
            if suspects:
                probe = self.suspicion.next_probe(suspects)
                assert probe
                assert probe <= suspects
                self.suspicion.close_probe(self._fly(probe))
            else:
                fallen = self._fly(frozenset(self.held))
                for line in fallen:
                    self.suspicion.note_failure(line)
                if fallen:
                    self.suspicion.note_death()
            self._judge()
            assert not self.suspicion.is_hopeless
        for line in self.aside:
            self._isolate(line)

    def _fill(self) -> None:
        while self.left and len(self.held) < self.window:
            self.held.add(self.left.pop(0))

    def _fly(self, lines: frozenset[int]) -> frozenset[int]:
        """Serve lines one after the other in any order; return those that were in flight at the death."""
        order = sorted(lines)
        self.chance.shuffle(order)
        self.sent.update(order)
        for done, line in enumerate(order):
            if line in self.poison or self._is_killed():
                self.deaths += 1
                self.barren += 1
                self.most_barren = max(self.most_barren, self.barren)
                return frozenset(order[done:])
            self.suspicion.note_answer(line)
            self.barren = 0
            self.answered[line] += 1
            self.held.discard(line)
        return frozenset()

    def _is_killed(self) -> bool:
        if self.outside_deaths and sum(self.answered.values()) >= self.outside_deaths[0]:
            self.outside_deaths.pop(0)
            return True
        return False

    def _judge(self) -> None:
        for line in list(self.held):
            if self.suspicion.is_convicted(line):
                self.held.discard(line)
                self.aside.add(line)
        for line in list(self.aside):
            if self.suspicion.is_proven(line):
                self.aside.discard(line)
                self._isolate(line)

    def _isolate(self, line: int) -> None:
        self.suspicion.forget(line)
        self.isolated[line] += 1


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, int, set[int], random.Random]:
    lines = draw(st.integers(1, 300))
    window = draw(st.integers(1, 128))
    poison = draw(st.sets(st.integers(0, lines - 1), min_size=1, max_size=3))
    return lines, window, poison, draw(st.randoms(use_true_random=False))


@given(batches())
def test_poison_is_isolated_and_nothing_else(given_batch: tuple[int, int, set[int], random.Random]) -> None:
    lines, window, poison, chance = given_batch
    driver = Driver(lines, window, poison, chance)
    driver.run()
    assert driver.isolated == Counter(dict.fromkeys(poison, 1))
    assert driver.answered == Counter(dict.fromkeys(set(range(lines)) - poison, 1))
    assert driver.suspicion.is_calm
    assert driver.deaths <= len(poison) * (math.ceil(math.log2(window)) + 5)
    assert driver.most_barren < MOST_BARREN


@given(st.integers(1, 300), st.integers(1, 128), st.lists(st.integers(0, 300), max_size=20), st.randoms())
def test_random_deaths_condemn_nobody(lines: int, window: int, deaths: list[int], chance: random.Random) -> None:
    """However they fall, but for one line that would be alone in flight at three of them after two others."""
    driver = Driver(lines, window, set(), chance)
    driver.outside_deaths = sorted(set(deaths))
    driver.run()
    assert not driver.isolated
    assert driver.answered == Counter(dict.fromkeys(range(lines), 1))


def test_a_line_is_convicted_at_its_third_death_alone() -> None:
    """Two may have another cause; that five of them meet the same line is another matter."""
    suspicion = Suspicion()
    for _ in range(2):
        suspicion.note_failure(7)
    for alone in range(1, 4):
        assert not suspicion.is_convicted(7)
        assert suspicion.next_probe({7}) == {7}
        suspicion.close_probe({7})
        assert suspicion.deaths(7) == (2 + alone, alone)
    assert suspicion.is_convicted(7)
    assert suspicion.next_probe({7}) == frozenset()
