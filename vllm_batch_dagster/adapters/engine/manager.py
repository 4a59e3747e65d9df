"""Our own engine, without a daemon: file locks in its folder decide who starts, uses, swaps and stops it.

In: `lease(model)` from the infer stage, `stop_idle` from a scheduled check. Out: a lease on a server that runs.

    lease: queue.lock -> start.lock -> the engine of this launch is there or can be made -> engine.lock (shared)
                                    -> it serves another model that is in use: let go of start.lock, look again later

A user whose engine died takes start.lock only (it already holds engine.lock shared), so it never waits for newcomers;
newcomers are served in the order of queue.lock, so a swap is not starved by users of the old model.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_batch_dagster.adapters.engine.config import EngineConfig, resolve_device
from vllm_batch_dagster.adapters.engine.folder import EngineFolder, EngineRecord
from vllm_batch_dagster.adapters.engine.launch import DRAIN_SECONDS, Launch, plan_launch
from vllm_batch_dagster.adapters.engine.lease import OwnLease
from vllm_batch_dagster.adapters.engine.locks import Hold, hold, hold_within, try_hold
from vllm_batch_dagster.adapters.engine.readiness import REPORT_SECONDS
from vllm_batch_dagster.adapters.engine.rungs import Ladder
from vllm_batch_dagster.adapters.engine.starter import Starter
from vllm_batch_dagster.core.errors import BatchError
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import EngineLease, EngineManager, Report

_LOOK_AGAIN_SECONDS = 0.5


def manage_engine(config: EngineConfig) -> EngineManager:
    """Return the manager of the engine in `config.folder`. Nothing is started yet."""
    return OwnEngine(config)


class OwnEngine:
    """One engine at a time, for whichever model is asked for."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._folder = EngineFolder(config.folder)
        self._starter = Starter(config, self._folder, Ladder(self._folder, config.start_tries))

    def lease(self, model: Model, report: Report) -> AbstractAsyncContextManager[EngineLease]:
        """See EngineManager.lease. Raises EngineStartFailed, ConfigurationError for arguments that cannot work."""
        return self._lease(model, report)

    @contextlib.asynccontextmanager
    async def _lease(self, model: Model, report: Report) -> AsyncIterator[EngineLease]:
        self._folder.create()
        launch = await asyncio.to_thread(self._plan, model)
        grant = await self._enter(launch, report)
        try:
            async with OwnLease(self._config, self._starter, launch, grant.record, report).opened() as lease:
                yield lease
        finally:
            with contextlib.suppress(OSError):
                self._folder.touch()
            grant.use.release()

    def _plan(self, model: Model) -> Launch:
        is_local = Path(model.path).is_dir()
        if is_local:
            model = replace(model, path=str(Path(model.path).absolute()))
        return plan_launch(self._config, resolve_device(self._config.device), model, is_local=is_local)

    async def _enter(self, launch: Launch, report: Report) -> "_Grant":
        queue = await hold(self._folder.queue_lock, on_wait=_paced(report, "waiting in line for the engine"))
        busy = _paced(report, f"waiting until the engine is free for {launch.model.name}: it serves another model")
        began = time.monotonic()
        try:
            while (grant := await self._try_enter(launch, report)) is None:
                busy(time.monotonic() - began)
                await asyncio.sleep(_LOOK_AGAIN_SECONDS)
            return grant
        finally:
            queue.release()

    async def _try_enter(self, launch: Launch, report: Report) -> "_Grant | None":
        start = await hold(
            self._folder.start_lock,
            on_wait=_paced(report, "waiting for another process that starts or stops the engine"),
        )
        use: Hold | None = None
        try:
            use = await self._take_use(launch, report)
            if use is None:
                return None
            grant = _Grant(await self._starter.ensure(launch, report), use)
            use = None
            return grant
        finally:
            start.release()
            if use is not None:
                use.release()

    async def _take_use(self, launch: Launch, report: Report) -> Hold | None:
        """Return a shared hold when the engine is of this launch, or is nobody's (then it has been stopped)."""
        if self._starter.current(launch) is not None:
            return try_hold(self._folder.use_lock, exclusive=False)
        use = try_hold(self._folder.use_lock, exclusive=True)
        if use is None:
            return None
        try:
            await self._starter.stop(launch, report)
            return use if use.share() else None
        except BaseException:
            use.release()
            raise

    def stop_idle(self, idle_seconds: float) -> str | None:
        """See EngineManager.stop_idle. Returns at once when somebody uses, starts or stops the engine."""
        if self._folder.read() is None or self._folder.idle_seconds() < idle_seconds:
            return None
        with self._alone() as is_alone:
            # Looked at again, because the last user may have left between the first look and the locks.
            is_idle = is_alone and self._folder.idle_seconds() >= idle_seconds
            return self._folder.end_engine(DRAIN_SECONDS) if is_idle else None

    def warm(self, model: Model, report: Report) -> None:
        """See EngineManager.warm. An engine that runs is left alone, also one of another model that nobody uses."""
        try:
            self._folder.create()
            launch = self._plan(model)
            with self._alone() as is_alone:
                if is_alone and not self._folder.living_groups():
                    self._starter.warm(launch, report)
        except BatchError as error:
            report(f"the engine of {model.name} was not started ahead of its first chunk: {error}")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Hold the engine against everybody, if at this moment nobody uses, starts or stops it; yields whether."""
        with hold_within(self._folder.start_lock, 0) as is_held:
            use = try_hold(self._folder.use_lock, exclusive=True) if is_held else None
            try:
                yield use is not None
            finally:
                if use is not None:
                    use.release()


@dataclass(frozen=True, slots=True)
class _Grant:
    """An engine that serves, and our shared hold on it."""

    record: EngineRecord
    use: Hold


def _paced(report: Report, sentence: str) -> Callable[[float], None]:
    """Return a callback for waits that reports after a second, then every few."""
    next_at = 1.0

    def say(waited: float) -> None:
        nonlocal next_at
        if waited >= next_at:
            next_at = waited + REPORT_SECONDS
            report(f"{sentence} ({waited:.0f} s)")

    return say
