"""Sends a batch while the engine's gauges are polled, and says what they showed. Used by `orchestration`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.chart import draw_gauges
from bench.figures import Figure, Target, collect
from bench.gauges import Border, Drain, GaugePoll, Sample, busy_span, find_borders, find_drain
from bench.stack import Stack
from bench.trips import send_batch

UNDRAINED = Target(1.0, at_least=True)


@dataclass(frozen=True, slots=True)
class Watch:
    """One watched batch. `samples` reach a second further than the batch on both sides."""

    drain: Drain
    borders: Sequence[Border]
    samples: Sequence[Sample]
    first_sent: float

    @property
    def at_borders(self) -> list[float]:
        """The least running + waiting at each border that can be judged."""
        return [border.lowest for border in self.borders if border.lowest is not None]

    def draw(self, title: str) -> str:
        return draw_gauges(self.samples, self.borders, title)

    def as_data(self) -> dict[str, Any]:
        """Return what the JSON file holds; times are seconds after the first line was sent."""
        begin = self.first_sent
        return {
            **asdict(self.drain),
            "borders": [{"chunk": each.index, "at": each.at - begin, "lowest": each.lowest} for each in self.borders],
            "series": [f"{each.at - begin:.3f} s: {each.running:.0f} + {each.waiting:.0f}" for each in self.samples],
        }


def watch_batch(stack: Stack, path: Path) -> Watch:
    """Send the file with the gauges polled. The engine must be warm."""
    with GaugePoll(stack.engine().url) as poll:
        trip = send_batch(stack, path)
    starts = [each.first_sent_at for each in stack.chunk_summaries(trip.batch_id)]
    first, last = stack.inference_span(trip.batch_id)
    return Watch(
        drain=find_drain(poll.samples, first, last),
        borders=find_borders(busy_span(poll.samples, first, last), starts),
        samples=[sample for sample in poll.samples if first - 1 <= sample.at <= last + 1],
        first_sent=first,
    )


def find_worst(watches: Sequence[Watch]) -> Watch:
    """Return the one in which the engine came nearest to having nothing to do."""
    return min(watches, key=lambda watch: watch.drain.minimum)


def describe_watches(watches: Sequence[Watch], undivided: Watch) -> list[Figure]:
    """Return the figures. "Never" is not a matter of medians: the least reading of all repetitions is judged.

    `undivided` is the same file as one chunk: what falls there as well has nothing to do with a border.
    """
    rows = [asdict(watch.drain) for watch in watches]
    near = [lowest for watch in watches for lowest in watch.at_borders]
    at_borders = [Figure("least running + waiting within 0.5 s of any chunk border", "requests", (min(near),))]
    return [
        Figure("least running + waiting inside any run", "requests", (min(row["minimum"] for row in rows),), UNDRAINED),
        *(at_borders if near else ()),
        Figure(
            "for comparison: least inside a run of 1 chunk, which has no border",
            "requests",
            (undivided.drain.minimum,),
        ),
        collect("longest time between two readings of the gauges", "s", rows, "longest_gap"),
        collect("first line sent to first request in a gauge", "s", rows, "lead"),
        collect("last request in a gauge to last answer", "s", rows, "tail"),
    ]
