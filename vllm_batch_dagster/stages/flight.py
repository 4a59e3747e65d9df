"""The window of a run: how many lines may be sent and not yet durable, which is all that a death can cost.

An answer that waits for its fsync still takes its place in the window, so whoever kills a run makes it send again at
most `window` lines. Used by inference, in its event loop only.
"""

import asyncio
from collections import Counter

# A commit begins when this share of the window waits for one, so that a fast engine does not wait for the clock.
_CROWDED = 4


class Flight:
    """`window` places. A line takes one before it is sent and gives it back when its answer is durable."""

    def __init__(self, window: int) -> None:
        self._places = asyncio.Semaphore(window)
        self._most_landed = max(1, window // _CROWDED)
        self._landed: Counter[int] = Counter()

    async def take_off(self) -> None:
        """Wait for a place."""
        await self._places.acquire()

    def land(self, chunk: int) -> bool:
        """A line of `chunk` is settled, its answer in the journal's buffer. True when a commit is due for that."""
        self._landed[chunk] += 1
        return self._landed.total() >= self._most_landed

    def landed(self, chunk: int) -> int:
        """Return how many lines of `chunk` the commit that begins now makes durable."""
        return self._landed.pop(chunk, 0)

    def release(self, lines: int) -> None:
        """They are durable: others may be sent."""
        for _ in range(lines):
            self._places.release()
