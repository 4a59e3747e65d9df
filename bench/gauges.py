"""Reads vLLM's running and waiting gauges while a batch runs, and says whether they ever fell to zero inside.

In: the engine's /metrics, polled from a thread. Out: samples, and what they say about chunk borders (pure).
"""

import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.sampling import Sampler

POLL_SECONDS = 0.05
_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
# Proxies of the environment are not meant for our own machine.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Sample:
    """Both gauges at `at` (unix seconds)."""

    at: float
    running: float
    waiting: float

    @property
    def total(self) -> float:
        return self.running + self.waiting


@dataclass(frozen=True, slots=True)
class Border:
    """When the run sends the first line of chunk `index`. `lowest`: the least running + waiting near by, None when
    the engine had not shown a request yet (the first window may span several chunks)."""

    index: int
    at: float
    lowest: float | None


@dataclass(frozen=True, slots=True)
class Drain:
    """What the samples say between the first and the last one in which the engine had a request.

    `lead` is the time from the first dispatch to that first sample, `tail` from that last one to the last answer, in
    seconds: the gauges change with the engine's steps, and a request spends time on HTTP and in the tokenizer.
    `longest_gap` is the longest time between two samples.
    """

    minimum: float
    zeros: int
    samples: int
    lead: float
    tail: float
    longest_gap: float


def read_gauges(text: str, at: float) -> Sample | None:
    """Read Prometheus text, summed over engines. None when a gauge is missing."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in (_RUNNING, _WAITING):
            sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
    return Sample(at, sums[_RUNNING], sums[_WAITING]) if len(sums) == 2 else None


def busy_span(samples: Sequence[Sample], first_sent: float, last_answer: float) -> Sequence[Sample]:
    """Return the samples of the batch from the first to the last one with a request. Raises ValueError for none."""
    inside = [sample for sample in samples if first_sent <= sample.at <= last_answer]
    busy = [index for index, sample in enumerate(inside) if sample.total > 0]
    if not busy:
        raise ValueError("no sample shows a request in the engine: the batch was too short for the poll")
    return inside[busy[0] : busy[-1] + 1]


def find_drain(samples: Sequence[Sample], first_sent: float, last_answer: float) -> Drain:
    """Judge the samples between `first_sent` and `last_answer`. Raises ValueError when none shows a request."""
    span = busy_span(samples, first_sent, last_answer)
    return Drain(
        minimum=min(sample.total for sample in span),
        zeros=sum(sample.total == 0 for sample in span),
        samples=len(span),
        lead=span[0].at - first_sent,
        tail=last_answer - span[-1].at,
        longest_gap=max((after.at - before.at for before, after in pairwise(span)), default=0.0),
    )


def find_borders(busy: Sequence[Sample], starts: Sequence[float], around: float = 0.5) -> list[Border]:
    """Return the borders between chunks. `busy` is the busy span; `starts` is when each chunk's first line was sent."""
    borders = []
    for index, at in enumerate(starts[1:], start=1):
        near = [sample.total for sample in busy if abs(sample.at - at) <= around]
        borders.append(Border(index, at, min(near, default=None)))
    return borders


class GaugePoll(Sampler):
    """Polls the gauges from `with` on."""

    def __init__(self, engine_url: str, clock: Callable[[], float] = time.time) -> None:
        self.samples: list[Sample] = []
        self._url = f"{engine_url}/metrics"
        self._clock = clock
        super().__init__("gauges", POLL_SECONDS)

    def sample(self) -> None:
        asked = self._clock()
        try:
            with _direct.open(self._url, timeout=5) as response:
                text = response.read().decode()
        except OSError:
            return  # the engine is busy: a gap in the series, and the count of samples shows it
        # The text is made at some moment between question and answer.
        sample = read_gauges(text, (asked + self._clock()) / 2)
        if sample is not None:
            self.samples.append(sample)
