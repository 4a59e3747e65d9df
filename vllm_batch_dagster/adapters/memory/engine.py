"""An engine without a network: a manager whose lease answers at once, with the simulated engine's answers.

`faults` sees every request first and can answer it, fail it, or let it pass: that is how tests make an engine die.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import msgspec

from vllm_batch_dagster.adapters.simulated.answers import Limits, Refused, answer_request
from vllm_batch_dagster.core.errors import EngineUnavailable
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import EngineAnswer, EngineLease, EngineRequest, Report
from vllm_batch_dagster.core.retry import Verdict, judge

Faults = Callable[[EngineRequest], EngineAnswer | Exception | None]
"""Returns what the engine answers, an exception that `send` raises, or None for the ordinary answer."""


class EchoEngine:
    """See EngineManager. It serves any model; equal requests get equal bytes.

    `latency` (seconds) is how long an answer takes. `on_recover` is called by every restart and may raise
    EngineFailure. `clock` (seconds, of any origin) measures idleness.
    """

    def __init__(
        self,
        faults: Faults | None = None,
        *,
        window: int = 16,
        latency: float = 0.0,
        max_model_len: int = 2048,
        on_recover: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._faults, self._on_recover = faults, on_recover
        self._window, self._latency, self._longest = window, latency, max_model_len
        self._clock, self._last_used = clock, clock()
        self._model: Model | None = None
        self._holders = 0
        self._restart: asyncio.Task[None] | None = None
        self.leases = 0
        self.recoveries = 0

    def lease(self, model: Model, report: Report) -> AbstractAsyncContextManager[EngineLease]:
        return self._hold(model, report)

    @asynccontextmanager
    async def _hold(self, model: Model, report: Report) -> AsyncIterator[EngineLease]:
        if self._model != model:
            report(f"the echo engine serves {model.name}")
            self._model = model
        self.leases += 1
        self._holders += 1
        try:
            yield EchoLease(self, model)
        finally:
            self._holders -= 1
            self._last_used = self._clock()

    def warm(self, model: Model, report: Report) -> None:
        if self._model is None:
            report(f"the echo engine serves {model.name}")
            self._model, self._last_used = model, self._clock()

    def stop_idle(self, idle_seconds: float) -> str | None:
        idle = self._clock() - self._last_used
        if self._model is None or self._holders or idle < idle_seconds:
            return None
        stopped, self._model = self._model.name, None
        return stopped

    @property
    def window(self) -> int:
        return self._window

    @property
    def context_length(self) -> int:
        return self._longest

    async def answer(self, model: Model, request: EngineRequest) -> EngineAnswer:
        """Raises what `faults` says."""
        await asyncio.sleep(self._latency)
        fault = self._faults(request) if self._faults else None
        if isinstance(fault, Exception):
            raise fault
        if fault is not None and judge(fault) is Verdict.ENGINE_DOWN:
            raise EngineUnavailable("the echo engine says that it is gone")
        return fault or _echo(request, Limits(model.names, self._longest), self._latency)

    async def recover(self) -> str:
        """Many callers at once share one restart. Raises what `on_recover` raises."""
        if self._restart is None or self._restart.done():
            self._restart = asyncio.create_task(self._restart_once())
        await asyncio.shield(self._restart)
        return "the echo engine was told to die"

    async def _restart_once(self) -> None:
        self.recoveries += 1
        if self._on_recover:
            self._on_recover()


class EchoLease:
    """See EngineLease."""

    def __init__(self, engine: EchoEngine, model: Model) -> None:
        self._engine, self._model = engine, model

    @property
    def window(self) -> int:
        return self._engine.window

    async def send(self, request: EngineRequest) -> EngineAnswer:
        return await self._engine.answer(self._model, request)

    async def context_length(self) -> int | None:
        return self._engine.context_length

    async def recover(self, limit: int | None = None) -> str:
        return await self._engine.recover()


def _echo(request: EngineRequest, limits: Limits, seconds: float) -> EngineAnswer:
    try:
        body = msgspec.json.decode(request.body, type=dict)
        answer = answer_request(request.endpoint, body, request.request_id, limits)
        status, content = 200, answer.body
    except msgspec.DecodeError as error:
        status, content = 400, Refused(400, str(error)).body
    except Refused as refused:
        status, content = refused.status, refused.body
    return EngineAnswer(status, msgspec.json.encode(content), request.request_id, seconds)
