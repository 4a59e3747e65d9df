"""The simulated scheduler: `max_num_seqs` requests at once, the others wait by priority, then by arrival."""

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """A priority semaphore. A lower priority number goes first."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._arrivals = 0
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self.running = 0

    @property
    def waiting(self) -> int:
        return sum(not turn.done() for _, _, turn in self._queue)

    @asynccontextmanager
    async def turn(self, priority: int) -> AsyncIterator[None]:
        """Wait for a slot and hold it."""
        await self._enter(priority)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._leave()

    async def _enter(self, priority: int) -> None:
        if self._free and not self._queue:
            self._free -= 1
            return
        mine = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        heapq.heappush(self._queue, (priority, self._arrivals, mine))
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._leave()  # The slot had just been handed over.
            raise

    def _leave(self) -> None:
        while self._queue:
            _, _, turn = heapq.heappop(self._queue)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
