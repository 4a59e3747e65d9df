"""The simulated server: routes, queue, gauges, witness log and faults. Built by `__main__`, or by tests in process."""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from vllm_batch_dagster.adapters.simulated.answers import Answer, Limits, Refused, answer_request
from vllm_batch_dagster.adapters.simulated.faults import Faults, read_faults
from vllm_batch_dagster.adapters.simulated.slots import Slots
from vllm_batch_dagster.adapters.simulated.start_logs import SERVING_OUT_OF_MEMORY, write_log

ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
)
_BODY_BYTES = 64 << 20
_PREFILL_STEP_SECONDS = 0.05
_CORE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


@dataclass(frozen=True, slots=True)
class Options:
    """How the simulated engine behaves: `latency` in seconds per request while it holds one of `max_num_seqs`
    slots, `latency_of` the same for single models; `witness` gets one line per request that arrives: its X-Request-Id.
    """

    models: tuple[str, ...] = ("simulated",)
    latency: float = 0.0
    latency_of: Mapping[str, float] = field(default_factory=dict)
    max_num_seqs: int = 128
    max_model_len: int = 2048
    witness: Path | None = None
    faults: Faults = field(default_factory=Faults)
    api_key: str = ""


class SimulatedEngine:
    """State of one simulated server."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._limits = Limits(options.models, options.max_model_len)
        self._slots = Slots(options.max_num_seqs)
        self._faults = options.faults
        self._witness = options.witness.open("ab", buffering=0) if options.witness else None
        self._seen = 0
        self._answered = 0
        self._tokens = {"prompt": 0, "generation": 0}
        self._kv_usage = 0.0
        self._core_died = asyncio.Event()

    def app(self) -> web.Application:
        """Return the server's application."""
        app = web.Application(client_max_size=_BODY_BYTES, middlewares=[self._with_request_id])
        for endpoint in ENDPOINTS:
            app.router.add_post(endpoint, self._infer)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/faults", self._set_faults)
        return app

    @web.middleware
    async def _with_request_id(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        key = self._options.api_key
        is_guarded = bool(key) and request.path.startswith("/v1/")
        if is_guarded and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        response = await handler(request)
        if "X-Request-Id" in request.headers:
            response.headers["X-Request-Id"] = request.headers["X-Request-Id"]
        return response

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        request_id = request.headers.get("X-Request-Id") or f"simulated-{self._seen}"
        self._seen += 1
        self._bear_witness(request_id)
        raw = await request.read()
        work = asyncio.ensure_future(self._work(request, raw, request_id))
        core_death = asyncio.ensure_future(self._core_died.wait())
        try:
            await asyncio.wait({work, core_death}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if not self._core_died.is_set() else _error(500, _CORE_DEAD, "InternalServerError")
        finally:
            work.cancel()
            core_death.cancel()

    def _die_if_due(self, raw: bytes) -> None:
        is_poison = bool(self._faults.poison) and self._faults.poison.encode() in raw
        if is_poison or self._faults.is_due("die_after", self._answered):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._faults.is_due("exit_after", self._answered):
            os._exit(self._faults.exit_code)
        is_full = self._faults.is_due("out_of_memory_after", self._answered)
        if is_full:
            write_log(SERVING_OUT_OF_MEMORY)
        if is_full or self._faults.is_due("core_dies_after", self._answered):
            self._core_died.set()
            asyncio.get_running_loop().call_later(0.1, os._exit, 0)

    async def _prefill(self) -> None:
        """Read a long prompt: what moves is the use of the KV cache only."""
        if not self._faults.take("prefill_next"):
            return
        steps = max(1, round(self._faults.prefill_seconds / _PREFILL_STEP_SECONDS))
        for step in range(steps):
            self._kv_usage = (step + 1) / steps
            await asyncio.sleep(_PREFILL_STEP_SECONDS)
        self._kv_usage = 0.0

    async def _work(self, request: web.Request, raw: bytes, request_id: str) -> web.StreamResponse:
        async with self._slots.turn(_priority(request)):
            await asyncio.sleep(self._latency(raw))
            await self._prefill()
            self._die_if_due(raw)
            if self._hangs_from(raw):
                await asyncio.Event().wait()
            response = await self._answer(request, raw, request_id)
        self._answered += 1
        return response

    def _hangs_from(self, raw: bytes) -> bool:
        if self._faults.hang_on and self._faults.hang_on.encode() in raw:
            self._faults.hang_after = self._answered  # from now on, for everybody
        return self._faults.is_due("hang_after", self._answered)

    def _latency(self, raw: bytes) -> float:
        named = (seconds for name, seconds in self._options.latency_of.items() if json.dumps(name).encode() in raw)
        return next(named, self._options.latency)

    async def _answer(self, request: web.Request, raw: bytes, request_id: str) -> web.StreamResponse:
        if self._faults.is_sick or self._faults.take("fail_next"):
            return _error(500, "simulated fault", "InternalServerError")
        if self._faults.take("busy_next"):
            return _error(503, "simulated overload", "Service Unavailable")
        try:
            answer = answer_request(request.path, _decode(raw), request_id, self._limits)
        except Refused as refusal:
            return web.json_response(refusal.body, status=refusal.status)
        except (TypeError, ValueError, LookupError) as error:
            return _error(400, str(error), "BadRequestError")
        self._tokens["prompt"] += answer.prompt_tokens
        self._tokens["generation"] += answer.output_tokens
        if self._faults.take("abort_next"):
            answer = _aborted(answer)
        body = json.dumps(answer.body, separators=(",", ":")).encode()
        if self._faults.take("cut_next"):
            return await _cut(request, body)
        return web.Response(body=body, content_type="application/json")

    def _bear_witness(self, request_id: str) -> None:
        if self._witness is not None:
            self._witness.write(request_id.encode() + b"\n")

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        if self._faults.hang_without_health and self._faults.is_due("hang_after", self._answered):
            await asyncio.Event().wait()
        return web.Response(status=503 if self._core_died.is_set() else 200)

    async def _metrics(self, _request: web.Request) -> web.StreamResponse:
        labels = f'{{engine="0",model_name="{self._options.models[0]}"}}'
        values: dict[str, tuple[str, float]] = {
            "vllm:num_requests_running": ("gauge", self._slots.running),
            "vllm:num_requests_waiting": ("gauge", self._slots.waiting),
            "vllm:kv_cache_usage_perc": ("gauge", self._kv_usage),
            "vllm:num_preemptions_total": ("counter", 0),
            "vllm:prompt_tokens_total": ("counter", self._tokens["prompt"]),
            "vllm:generation_tokens_total": ("counter", self._tokens["generation"]),
        }
        lines = [f"# TYPE {name} {kind}\n{name}{labels} {float(value)}" for name, (kind, value) in values.items()]
        return web.Response(text="\n".join(lines) + "\n")

    async def _version(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"version": "simulated"})

    async def _models(self, _request: web.Request) -> web.StreamResponse:
        cards = [
            {
                "id": name,
                "object": "model",
                "owned_by": "simulated",
                "root": name,
                "parent": None,
                "max_model_len": self._options.max_model_len,
            }
            for name in self._options.models
        ]
        return web.json_response({"object": "list", "data": cards})

    async def _set_faults(self, request: web.Request) -> web.StreamResponse:
        try:
            self._faults = read_faults(await request.read())
        except msgspec.ValidationError as error:
            return _error(400, str(error), "BadRequestError")
        self._answered = 0
        return web.json_response(msgspec.to_builtins(self._faults))


def _decode(raw: bytes) -> dict[str, Any]:
    body = json.loads(raw)
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    return body


def _priority(request: web.Request) -> int:
    try:
        return int(request.headers.get("X-Vllm-Priority", "0"))
    except ValueError:
        return 0


def _error(status: int, message: str, kind: str) -> web.Response:
    return web.json_response(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status=status
    )


def _aborted(answer: Answer) -> Answer:
    """An engine that stops in the middle says 200 with what it has (engine report D6)."""
    choices = [{**choice, "finish_reason": "abort"} for choice in answer.body.get("choices", [])]
    return Answer({**answer.body, "choices": choices}, answer.prompt_tokens, answer.output_tokens)


async def _cut(request: web.Request, body: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    if request.transport is not None:
        request.transport.abort()
    return response
