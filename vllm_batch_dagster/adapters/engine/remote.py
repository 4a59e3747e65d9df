"""Servers that somebody else runs, behind ENGINE_URL: no life cycle, but health, a circuit per server and balancing.

In: `lease(model)` from the infer stage. Out: a lease that sends each line to the healthy server with the least work.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from vllm_batch_dagster.adapters.engine.launch import WINDOW_PER_SEQUENCE
from vllm_batch_dagster.adapters.engine.pool import Pool
from vllm_batch_dagster.adapters.engine.recovery import Recovery
from vllm_batch_dagster.adapters.engine.server import Pace
from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import EngineAnswer, EngineLease, EngineManager, EngineRequest, Report

_DEFAULT_SEQS = 256


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """`urls` are base URLs without /v1; `max_num_seqs` is per server; durations in seconds."""

    urls: tuple[str, ...]
    api_key: str
    max_num_seqs: int
    start_seconds: float
    restarts: int
    pace: Pace


def connect_engines(
    urls: str,
    api_key: str = "",
    max_num_seqs: int = 0,
    *,
    start_seconds: float = 900.0,
    restarts: int = 3,
    stall_seconds: float = 120.0,
    health_seconds: float = 2.0,
) -> EngineManager:
    """Return a manager of the servers at `urls` (comma-separated). Nothing is asked yet.

    `max_num_seqs` 0 means 256, `start_seconds` is how long a lease waits for a server that does not answer.
    Raises ConfigurationError for something that is not a URL.
    """
    pace = Pace(health_seconds, stall_seconds)
    seqs = max_num_seqs or _DEFAULT_SEQS
    return RemoteEngines(RemoteConfig(split_urls(urls), api_key, seqs, start_seconds, restarts, pace))


def split_urls(urls: str) -> tuple[str, ...]:
    """Return the base URLs in a comma-separated list, without a trailing `/` or `/v1`. Raises ConfigurationError."""
    bases = dict.fromkeys(_base_url(url.strip()) for url in urls.split(",") if url.strip())
    if not bases:
        raise ConfigurationError("ENGINE_URL names no server: set it to the base URL of a vLLM server")
    return tuple(bases)


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"ENGINE_URL: {url!r} is not a URL like http://gpu-host:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


class RemoteEngines:
    """The servers behind ENGINE_URL."""

    def __init__(self, config: RemoteConfig) -> None:
        self._config = config

    def lease(self, model: Model, report: Report) -> AbstractAsyncContextManager[EngineLease]:
        """See EngineManager.lease. Raises EngineFailure when no server answers in time or none serves the model."""
        return self._lease(model, report)

    @asynccontextmanager
    async def _lease(self, model: Model, report: Report) -> AsyncIterator[EngineLease]:
        config = self._config
        pool = Pool(config.urls, config.api_key, config.pace, model, config.start_seconds)
        lease = RemoteLease(pool, WINDOW_PER_SEQUENCE * config.max_num_seqs * len(config.urls), config.restarts, report)
        try:
            await pool.wait_for_one(report)
            pool.open()
            yield lease
        finally:
            await lease.close()
            await pool.close()

    def stop_idle(self, idle_seconds: float) -> str | None:
        """Nothing: their life is not ours."""
        return None

    def warm(self, model: Model, report: Report) -> None:
        """Nothing, for the same reason."""


class RemoteLease:
    """See EngineLease."""

    def __init__(self, pool: Pool, window: int, restarts: int, report: Report) -> None:
        self._pool = pool
        self._window = window
        self._report = report
        self._recovery = Recovery(self._bring_back, restarts)

    @property
    def window(self) -> int:
        return self._window

    async def send(self, request: EngineRequest) -> EngineAnswer:
        return await self._recovery.watch(self._pool.send(request))

    async def context_length(self) -> int | None:
        return await self._pool.context_length()

    async def recover(self, limit: int | None = None) -> str:
        return await self._recovery.run(limit)

    async def close(self) -> None:
        await self._recovery.close()

    async def _bring_back(self, _tries: int) -> str:
        await self._pool.wait_for_one(self._report)
        return ""
