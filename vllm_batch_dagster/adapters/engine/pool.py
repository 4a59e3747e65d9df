"""Several servers of somebody else as one: which of them may get a request, and when one that failed may again."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryError, retry_if_result, stop_after_delay, wait_exponential

from vllm_batch_dagster.adapters.engine.client import EngineClient
from vllm_batch_dagster.adapters.engine.server import Pace, Server
from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable, EngineUnreachable
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest, Report

_LONGEST_PAUSE = 30.0


@dataclass(slots=True)
class _Member:
    """A server and its circuit. `strikes` counts how often it was left out since it last answered a request."""

    server: Server
    strikes: int = 0
    closed_until: float = 0.0
    refusal: str = ""


class Pool:
    """The servers of one lease. Make it inside a running event loop and close it there."""

    def __init__(self, urls: Sequence[str], api_key: str, pace: Pace, model: Model, start_seconds: float) -> None:
        self._model = model
        self._pace = pace
        self._start_seconds = start_seconds
        self._clock = asyncio.get_running_loop().time
        self._members = [
            _Member(Server(EngineClient(url, api_key, pace.probe_seconds), pace, _do_nothing)) for url in urls
        ]
        self._readmission: asyncio.Task[None] | None = None
        for member in self._members:
            member.server.declare_down("not asked yet")

    def open(self) -> None:
        """Begin to watch the servers, and to take back those that answer again."""
        for member in self._members:
            member.server.open()
        self._readmission = asyncio.create_task(self._readmit_for_ever())

    async def close(self) -> None:
        if self._readmission is not None:
            self._readmission.cancel()
            await asyncio.wait([self._readmission])
        for member in self._members:
            await member.server.close()

    async def send(self, request: EngineRequest) -> EngineAnswer:
        """Send to the server in use with the fewest requests of ours. Raises EngineUnavailable."""
        usable = [member for member in self._members if member.server.down is None]
        if not usable:
            raise EngineUnavailable(self._why_none(), was_sent=False)
        member = min(usable, key=lambda each: each.server.outstanding)
        try:
            answer = await member.server.send(request)
        except EngineUnavailable as error:
            await self._leave_out(member, str(error))
            raise
        member.strikes = 0
        return answer

    async def context_length(self) -> int | None:
        """The shortest of the servers in use: any of them may get a request. None when one of them does not say."""
        usable = [member.server.client for member in self._members if member.server.down is None]
        lengths = await asyncio.gather(*(client.context_length() for client in usable))
        known = [length for length in lengths if length is not None]
        return min(known) if known and len(known) == len(lengths) else None

    async def _leave_out(self, member: _Member, why: str) -> None:
        """Open the circuit, unless only one connection broke and the server is well."""
        if member.server.down is None and not await member.server.client.is_healthy():
            member.server.declare_down(why)
        now = self._clock()
        if member.server.down is not None and now >= member.closed_until:
            # A server that drains says that it is healthy: the pause grows until it answers requests again.
            member.closed_until = now + min(_LONGEST_PAUSE, self._pace.health_seconds * 2**member.strikes)
            member.strikes += 1

    async def wait_for_one(self, report: Report) -> None:
        """Return when at least one server serves the model. Raises EngineFailure when none will, or none in time."""
        waiting = AsyncRetrying(
            retry=retry_if_result(lambda is_there: not is_there),
            wait=wait_exponential(multiplier=self._pace.health_seconds / 4, max=_LONGEST_PAUSE),
            stop=stop_after_delay(self._start_seconds),
            before_sleep=lambda _state: report(f"waiting: {self._why_none()}"),
        )
        try:
            await waiting(self._admit_all)
        except RetryError as error:
            waited = f"after {self._start_seconds:.0f} s (ENGINE_START_SECONDS)"
            raise EngineUnreachable(f"{self._why_none()} {waited}") from error

    async def _admit_all(self) -> bool:
        """Ask every server that is left out; True when one is usable. Raises EngineFailure when all refuse for good."""
        await asyncio.gather(*(self._admit(member) for member in self._members))
        if any(member.server.down is None for member in self._members):
            return True
        if all(member.refusal for member in self._members):
            raise EngineUnreachable("; ".join(member.refusal for member in self._members))
        return False

    async def _admit(self, member: _Member) -> None:
        server = member.server
        if server.down is None or self._clock() < member.closed_until or not await server.client.is_healthy():
            return
        try:
            served = await server.client.served_models()
        except EngineUnavailable:
            return
        except EngineFailure as error:
            member.refusal = str(error)
            return
        member.refusal = self._misses(server, served)
        if not member.refusal:
            server.admit()

    def _misses(self, server: Server, served: Collection[str]) -> str:
        if set(self._model.names).intersection(served):
            return ""
        return (
            f"{server.client.base_url} does not serve model {self._model.name!r}; "
            f"it serves: {', '.join(served) or 'nothing'}"
        )

    async def _readmit_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._pace.health_seconds)
            await asyncio.gather(*(self._admit(member) for member in self._members))

    def _why_none(self) -> str:
        reasons = "; ".join(
            f"{member.server.client.base_url}: {member.refusal or member.server.down or 'in use'}"
            for member in self._members
        )
        return f"no server of ENGINE_URL can be used ({reasons})"


def _do_nothing() -> None:
    """Servers of somebody else keep no note of when we used them."""
