"""HTTP to one vLLM server. In: request lines as bytes. Out: answers as bytes, or EngineUnavailable when none came.

It knows nothing of processes, other servers or retries of lines: `server.Server` watches over it.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp
import msgspec
from yarl import URL

from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest

# Below the 5 s after which vLLM closes idle sockets by default, or whole bursts are lost (engine report D5, 2.3).
_KEEPALIVE_SECONDS = 3.0
_CONNECT_SECONDS = 30.0
PROBE_SECONDS = 5.0

_RUNNING = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_KV_USAGE = ("vllm:kv_cache_usage_perc",)
_TOKENS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
_READ = frozenset((*_RUNNING, *_KV_USAGE, *_TOKENS))

# What aiohttp raises when the connection fails in any way; TimeoutError only from the socket, there is no other limit.
_NO_ANSWER = (aiohttp.ClientError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine's own gauges say: requests that it has, tokens that it has worked off since it started, and the
    share of its KV cache in use, which grows with every step of a long prefill while no token is counted yet."""

    requests: float
    tokens: float
    kv_usage: float = 0.0


class _ModelCard(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


class EngineClient:
    """One server. `probe_seconds` is how long /health and the like may take.

    Make it inside a running event loop and close it there.
    """

    def __init__(self, base_url: str, api_key: str = "", probe_seconds: float = PROBE_SECONDS) -> None:
        self.base_url = base_url
        self._probe = aiohttp.ClientTimeout(total=probe_seconds)
        self._urls: dict[str, URL] = {}
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_mark_reused)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            headers={
                "Accept-Encoding": "identity",
                **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            },
            trace_configs=[tracing],
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        # A question about the server's health must not meet an old socket, least of all when the pool is full of them.
        self._fresh = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            headers=self._session.headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        await self._session.close()
        await self._fresh.close()

    async def exchange(self, request: EngineRequest) -> EngineAnswer:
        """Send one line and read its whole answer. Raises EngineUnavailable.

        A request that met a pooled socket which the server had just closed is sent again, at once, if the server is
        well: it never reached the engine. The next socket may be as old; a new one ends that.
        """
        while True:
            trace = SimpleNamespace(reused=False, answered=False)
            try:
                return await self._post(request, trace)
            except _NO_ANSWER as error:
                if not trace.reused or trace.answered or not await self.is_healthy():
                    raise self._unavailable(error) from error

    async def _post(self, request: EngineRequest, trace: SimpleNamespace) -> EngineAnswer:
        clock = asyncio.get_running_loop().time
        began = clock()
        async with self._session.post(
            self._url(request.endpoint),
            data=request.body,
            headers=_headers(request),
            allow_redirects=False,
            trace_request_ctx=trace,
        ) as response:
            trace.answered = True
            body = await response.read()
        request_id = response.headers.get("x-request-id", request.request_id)
        return EngineAnswer(response.status, body, request_id, clock() - began)

    async def is_healthy(self) -> bool:
        """Ask /health. A frozen engine still says yes; a dead engine core answers 503 (engine report 5.2)."""
        try:
            async with self._fresh.get(self._url("/health"), timeout=self._probe) as response:
                return response.status == 200
        except _NO_ANSWER:
            return False

    async def served_models(self) -> Mapping[str, int]:
        """Return the names in /v1/models with their context lengths, 0 where it is not said.

        Raises EngineUnavailable, and EngineFailure when it is refused.
        """
        try:
            async with self._session.get(self._url("/v1/models"), timeout=self._probe) as response:
                body = await response.read()
        except _NO_ANSWER as error:
            raise self._unavailable(error) from error
        if response.status in (401, 403):
            raise EngineFailure(f"{self.base_url} refuses our key ({response.status}): set ENGINE_API_KEY")
        try:
            return {card.id: card.max_model_len or 0 for card in msgspec.json.decode(body, type=_ModelList).data}
        except msgspec.DecodeError as error:
            raise EngineFailure(
                f"{self.base_url}/v1/models answered {response.status} and no list of models: is it a vLLM server?"
            ) from error

    async def context_length(self) -> int | None:
        """Return the shortest context of the served models, None when the server does not say."""
        try:
            served = await self.served_models()
        except EngineFailure:
            return None
        return min((length for length in served.values() if length), default=None)

    async def load(self) -> Load | None:
        """Read /metrics; None when it does not say (no vLLM gauges, or no answer)."""
        try:
            async with self._session.get(self._url("/metrics"), timeout=self._probe) as response:
                text = (await response.read()).decode("utf-8", "replace") if response.status == 200 else ""
        except _NO_ANSWER:
            return None
        return read_load(text)

    def _url(self, path: str) -> URL:
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = URL(self.base_url + path)
        return url

    def _unavailable(self, error: BaseException) -> EngineUnavailable:
        was_sent = not isinstance(error, aiohttp.ClientConnectorError)
        return EngineUnavailable(f"no answer from {self.base_url}: {type(error).__name__}: {error}", was_sent=was_sent)


def _headers(request: EngineRequest) -> Mapping[str, str]:
    return {
        "Content-Type": "application/json",
        "X-Request-Id": request.request_id,
        "X-Vllm-Priority": str(request.priority),
    }


async def _mark_reused(
    _session: aiohttp.ClientSession, context: SimpleNamespace, _params: aiohttp.TraceConnectionReuseconnParams
) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.reused = True


def read_load(text: str) -> Load | None:
    """Read the gauges from Prometheus text, summed over engines. None when the token counters are not there."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in _READ:
            sums[name] = sums.get(name, 0.0) + _number(line.rpartition(" ")[2])
    if not all(name in sums for name in _TOKENS):
        return None
    requests, tokens, usage = (sum(sums.get(name, 0.0) for name in names) for names in (_RUNNING, _TOKENS, _KV_USAGE))
    return Load(requests, tokens, usage)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
