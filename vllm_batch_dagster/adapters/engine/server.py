"""One server as a lease sees it: it sends, counts what is in flight, and is declared down when it stops serving.

Clients of a dying or frozen vLLM may get neither an answer nor a reset (engine report D8). So a server is watched from
beside: by /health, and by the progress of its token counters. Declaring it down ends everything in flight at once.
One that answers 500 to everybody and calls itself healthy is declared down as well.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from vllm_batch_dagster.adapters.engine.client import EngineClient, Load
from vllm_batch_dagster.core.errors import EngineUnavailable
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest
from vllm_batch_dagster.core.retry import Verdict, judge

_REFUSALS = 2
_CLOSED_DOORS = frozenset({401, 403})
_LONGEST_PROGRESS_LOOK = 10.0
# So many different requests in a row with a 500 are not about the requests.
_SICK_AFTER = 16
_OVERLOAD = 503


@dataclass(frozen=True, slots=True)
class Pace:
    """How often /health is asked, and how long an engine with work may stand still, in seconds."""

    health_seconds: float = 2.0
    stall_seconds: float = 120.0

    @property
    def probe_seconds(self) -> float:
        """How long an answer of /health may take: 5 s at the default pace, when a healthy one takes 20 ms."""
        return 2.5 * self.health_seconds


class Server:
    """Sends to one server until it is declared down."""

    def __init__(self, client: EngineClient, pace: Pace, on_watch: Callable[[], None]) -> None:
        self.client = client
        self.down: str | None = None
        self._pace = pace
        self._on_watch = on_watch
        self._answers = 0
        self._refused: set[str] = set()
        self._flying: set[asyncio.Timeout] = set()
        self._watch: asyncio.Task[None] | None = None

    @property
    def outstanding(self) -> int:
        """How many requests wait for an answer."""
        return len(self._flying)

    def admit(self) -> None:
        """Send to it again."""
        self.down = None
        self._refused.clear()

    def open(self) -> None:
        """Begin to watch. `on_watch` is called at every look."""
        self._watch = asyncio.create_task(self._watch_over())

    async def close(self) -> None:
        """Stop watching and close the connections; what is still in flight becomes EngineUnavailable."""
        self.declare_down("the engine was let go")
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await self.client.close()

    async def send(self, request: EngineRequest) -> EngineAnswer:
        """Return the answer. Raises EngineUnavailable when none will come, or when it says that the engine died."""
        if self.down is not None:
            raise EngineUnavailable(self.down, was_sent=False)
        answer = await self._exchange(request)
        if answer.status in _CLOSED_DOORS or 300 <= answer.status < 400:
            # A wrong key or a login page: about us, not about the line.
            self.declare_down(f"{self.client.base_url} answers {answer.status}: check ENGINE_URL and ENGINE_API_KEY")
            raise EngineUnavailable(self.down or "", was_sent=False)
        if answer.status >= 500 or b'"abort"' in answer.body:
            await self._suspect(answer)
        self._note(request, answer)
        return answer

    def _note(self, request: EngineRequest, answer: EngineAnswer) -> None:
        """Count the answer, and those in a row that were none of the request's own. Raises EngineUnavailable."""
        self._answers += 1
        if answer.status < 500:
            self._refused.clear()
        elif answer.status != _OVERLOAD:
            self._refused.add(request.request_id)
        if len(self._refused) >= _SICK_AFTER:
            self.declare_down(f"{self.client.base_url} answered {answer.status} to {_SICK_AFTER} requests in a row")
            raise EngineUnavailable(self.down or "")

    async def _exchange(self, request: EngineRequest) -> EngineAnswer:
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._flying.add(scope)
                return await self.client.exchange(request)
        except TimeoutError:
            raise EngineUnavailable(self.down or f"no answer from {self.client.base_url}") from None
        finally:
            self._flying.discard(scope)

    async def _suspect(self, answer: EngineAnswer) -> None:
        """An engine that dies answers 500 first, or aborts, everything in flight: such an answer is none."""
        if judge(answer) is Verdict.ENGINE_DOWN:
            self.declare_down(f"{self.client.base_url} says that its engine is gone ({answer.status})")
        elif not await self.client.is_healthy():
            self.declare_down(f"{self.client.base_url} answered {answer.status} and is not healthy")
        if self.down is not None:
            raise EngineUnavailable(self.down)

    def declare_down(self, why: str) -> None:
        """Let everything in flight, and everything to come, raise EngineUnavailable."""
        self.down = self.down or why
        for scope in self._flying:
            if not scope.expired():
                scope.reschedule(0.0)

    async def _watch_over(self) -> None:
        life, progress = _Life(), _Progress(self._pace)
        while True:
            await asyncio.sleep(self._pace.health_seconds)
            self._on_watch()
            if self.down is not None:
                life, progress = _Life(), _Progress(self._pace)
                continue
            why = life.judge(await self.client.is_healthy())
            if why is None and progress.is_due(bool(self._flying)):
                why = progress.judge(await self.client.load(), self._answers)
            if why is not None:
                self.declare_down(f"{self.client.base_url} {why}")


class _Life:
    """Two refusals in a row are a death."""

    def __init__(self) -> None:
        self._refusals = 0

    def judge(self, is_healthy: bool) -> str | None:
        self._refusals = 0 if is_healthy else self._refusals + 1
        return f"did not answer /health {_REFUSALS} times" if self._refusals >= _REFUSALS else None


class _Progress:
    """An engine that has our requests, but neither answers nor works off tokens nor fills its KV cache, hangs.

    It does not ask for running requests: an engine that froze while idle never counts those that came later.
    """

    def __init__(self, pace: Pace) -> None:
        self._clock = asyncio.get_running_loop().time
        self._stall = pace.stall_seconds
        self._interval = min(_LONGEST_PROGRESS_LOOK, pace.stall_seconds / 4)
        self._looked = self._moved = self._clock()
        self._mark: tuple[Load, int] | None = None

    def is_due(self, has_work: bool) -> bool:
        now = self._clock()
        if not has_work:
            self._looked = self._moved = now
            self._mark = None
        return has_work and now - self._looked >= self._interval

    def judge(self, load: Load | None, answers: int) -> str | None:
        self._looked = now = self._clock()
        mark = (load, answers) if load is not None else None
        if mark is None or mark != self._mark:
            self._mark, self._moved = mark, now
        if now - self._moved < self._stall or load is None:
            return None
        return f"hangs: {load.requests:.0f} requests and no token for {now - self._moved:.0f} s"
