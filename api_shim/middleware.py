"""The outermost layer of the API: a request id on every response, an envelope for every crash, a log line.

Pure ASGI, so that bodies stream through untouched. It wraps routing and the error table (api_shim/errors.py).
"""

import secrets
import time
from dataclasses import dataclass, field

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_shim.errors import envelope

READS = frozenset({"GET", "HEAD"})


@dataclass(slots=True)
class _Exchange:
    """One request and what became of it. `started` is a reading of the monotonic clock in seconds."""

    request_id: str = field(default_factory=lambda: f"req_{secrets.token_hex(16)}")
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None

    @property
    def milliseconds(self) -> int:
        return round((time.perf_counter() - self.started) * 1000)

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"x-request-id", self.request_id.encode()),
            (b"openai-processing-ms", str(self.milliseconds).encode()),
        ]


class RequestTrace:
    """ASGI middleware. Headers are OpenAI's (contract E.6)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._log = structlog.get_logger("api")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange()

        async def send_traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *exchange.headers()]}
            await send(message)

        try:
            await self._app(scope, receive, send_traced)
        except Exception:
            self._log.exception("request failed", request_id=exchange.request_id, path=scope["path"])
            if exchange.status is not None:
                raise
            await _crash_response(exchange.request_id)(scope, receive, send_traced)
        finally:
            self._report(scope, exchange)

    def _report(self, scope: Scope, exchange: _Exchange) -> None:
        # Clients poll: what only reads, and works, would bury everything else.
        is_quiet = scope["method"] in READS and exchange.status is not None and exchange.status < 400
        write = self._log.debug if is_quiet else self._log.info
        write(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=exchange.status,
            ms=exchange.milliseconds,
            request_id=exchange.request_id,
        )


def _crash_response(request_id: str) -> ASGIApp:
    return envelope(
        500,
        f"The server had an error while processing your request. Its log has the cause under {request_id}.",
    )
