"""A histogram of lengths in tokens with power-of-two buckets: constant size, and it adds up over chunks."""

from collections.abc import Iterable, Iterator

Buckets = tuple[tuple[int, int], ...]

_BAR = "█"


class Histogram:
    """Counts lengths. Bucket `b` holds lengths up to and including `b` tokens, above the one before it."""

    def __init__(self, buckets: Iterable[tuple[int, int]] = ()) -> None:
        self._counts: dict[int, int] = {}
        self.merge(buckets)

    def add(self, length: int) -> None:
        bucket = 1 << max(0, length - 1).bit_length() if length > 0 else 0
        self._counts[bucket] = self._counts.get(bucket, 0) + 1

    def merge(self, buckets: Iterable[tuple[int, int]]) -> None:
        for bucket, count in buckets:
            self._counts[bucket] = self._counts.get(bucket, 0) + count

    def buckets(self) -> Buckets:
        """Return (upper bound, count) pairs, smallest bound first."""
        return tuple(sorted(self._counts.items()))


def draw_histogram(buckets: Buckets, width: int = 32) -> str:
    """Return the histogram as text lines with bars; empty for no data."""
    most = max((count for _bucket, count in buckets), default=0)
    lines = (f"{'≤ ' + str(bucket):>8}  {_bar(count, most, width)}{count}" for bucket, count in _fill(buckets))
    return "\n".join(lines) if most else ""


def _bar(count: int, most: int, width: int) -> str:
    return _BAR * max(1, round(width * count / most)) + " " if count else ""


def _fill(buckets: Buckets) -> Iterator[tuple[int, int]]:
    """Yield the buckets and the empty ones between them: bounds double, but for 0, which is followed by 1."""
    expected = None
    for bucket, count in buckets:
        while expected is not None and expected < bucket:
            yield expected, 0
            expected *= 2
        yield bucket, count
        expected = max(1, bucket * 2)
