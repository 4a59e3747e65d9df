"""Many requests fail together when an engine dies, and one of them must bring it back. This keeps the others out."""

import asyncio
from collections.abc import Awaitable, Callable

from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable
from vllm_batch_dagster.core.ports import EngineAnswer

# A line whose connection always breaks, while the engine answers others, must not make a busy loop.
_PAUSE_SECONDS = 1.0


class Recovery:
    """Runs `bring_back` once for all failures of one generation; a recovery begins the next generation.

    `bring_back` gets the number of recoveries since the last good answer, beginning at 1, and returns what it saw of
    the dead engine. After `limit` of those it is not called again: the engine comes back and dies on the same work each
    time. Who looks for the work that kills it asks for a higher limit.
    """

    def __init__(self, bring_back: Callable[[int], Awaitable[str]], limit: int) -> None:
        self.generation = 0
        self._failed = -1
        self._bring_back = bring_back
        self._limit = limit
        self._since_answer = 0
        self._running: asyncio.Task[None] | None = None
        self._last_failure = self._seen = ""
        self._clock = asyncio.get_running_loop().time
        self._not_before = 0.0

    async def watch(self, sending: Awaitable[EngineAnswer]) -> EngineAnswer:
        """Return the answer of a request, having noted what it says of the engine. Raises EngineUnavailable."""
        generation = self.generation
        try:
            answer = await sending
        except EngineUnavailable as error:
            self.note_failure(generation, str(error))
            raise
        if answer.status < 500:
            self.note_answer()
        return answer

    def note_failure(self, generation: int, why: str) -> None:
        """A request that was sent in `generation` got no answer."""
        self._failed = max(self._failed, generation)
        self._last_failure = why

    def note_answer(self) -> None:
        """The engine did some work."""
        self._since_answer = 0

    async def run(self, limit: int | None = None) -> str:
        """Return when the generation after the failed one has begun: with what was seen of the last death. Raises what
        `bring_back` raises, EngineFailure when the limit is reached."""
        if self._failed < self.generation:
            return self._seen
        if self._running is None:
            self._running = asyncio.create_task(self._recover(limit or self._limit))
            self._running.add_done_callback(self._forget)
        # Shielded: one caller that is cancelled must not take the recovery from the others.
        await asyncio.shield(self._running)
        return self._seen

    async def close(self) -> None:
        """Stop a recovery that nobody waits for any more."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def _recover(self, limit: int) -> None:
        if self._since_answer >= limit:
            raise EngineFailure(
                f"the engine was brought back {self._since_answer} times without one answer between; "
                f"last failure: {self._last_failure}"
            )
        await asyncio.sleep(max(0.0, self._not_before - self._clock()))
        self._since_answer += 1
        failure = self._last_failure
        words = await self._bring_back(self._since_answer)
        self._seen = "; ".join(filter(None, (failure, words)))
        self._not_before = self._clock() + _PAUSE_SECONDS
        self.generation += 1

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._running = None
        if not task.cancelled():
            task.exception()  # Every waiter may be gone: it counts as seen.
