"""Who calls: the bearer key of a request, the project that it belongs to, or the 401. The outer gate of the API.

Pure ASGI, inside the request trace (api_shim/middleware.py) and outside of every route, so that a route cannot forget
it and no body is read for a stranger. As long as no key was ever made, everybody is the default project.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from anyio import Lock, to_thread
from starlette.types import ASGIApp, Receive, Scope, Send

from api_shim.deps import PROJECT, Services
from api_shim.errors import envelope
from api_shim.limits import RateLimiter
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.keys import Key, hash_secret, is_same_hash, mask_secret, read_bearer
from vllm_batch_dagster.core.models import DEFAULT_PROJECT
from vllm_batch_dagster.core.ports import Clock, KeyRecords

FRESH_SECONDS = 1.0  # how long a key that was revoked may go on
USE_SECONDS = 3600  # `last_used_at` is written no more often, so that reading costs no write
STATUS_PATH = "/"
# Tell nothing about anybody's data. Whatever is not listed asks for a key.
OPEN_PATHS = frozenset({"/health", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY). Keys are made with `vllm-batch keys create --project NAME`."
)
WRONG_KEY = "invalid_api_key"


class KeyRing:
    """The keys as the store has them, at most a second old. One event loop."""

    def __init__(self, records: KeyRecords, clock: Clock, timer: Callable[[], float] = time.monotonic) -> None:
        self._records, self._clock, self._timer = records, clock, timer
        self._keys: Mapping[str, Key] = {}
        self._read_at: float | None = None
        self._used_at: dict[str, int] = {}
        self._reading = Lock()

    async def is_empty(self) -> bool:
        """True when no key was ever made. Raises StorageFailure."""
        return not await self._current()

    async def find(self, secret: str) -> Key | None:
        """Return the live key that `secret` is. Raises StorageFailure."""
        sent = hash_secret(secret)
        key = (await self._current()).get(sent)
        if key is None or not is_same_hash(key.hash, sent) or not key.is_live:
            return None
        await self._note_use(key)
        return key

    async def _current(self) -> Mapping[str, Key]:
        if self._is_old():
            async with self._reading:
                if self._is_old():
                    began = self._timer()
                    keys = await to_thread.run_sync(self._records.list)
                    self._keys, self._read_at = {key.hash: key for key in keys}, began
        return self._keys

    def _is_old(self) -> bool:
        return self._read_at is None or self._timer() - self._read_at >= FRESH_SECONDS

    async def _note_use(self, key: Key) -> None:
        now = int(self._clock())
        if now - self._used_at.get(key.id, key.last_used_at or 0) < USE_SECONDS:
            return
        self._used_at[key.id] = now
        with suppress(StorageFailure):  # a full disk must not lock its owner out
            await to_thread.run_sync(self._records.touch, key.id, now)


class KeyGate:
    """ASGI middleware. Puts the caller's project into the scope, or answers 401 or 429."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._ring = KeyRing(services.store.keys, services.clock)
        self._limiter = RateLimiter(services.settings.max_requests_per_minute, services.clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._app
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            answer = await self._judge(scope) or self._app
        await answer(scope, receive, send)

    async def _judge(self, scope: Scope) -> ASGIApp | None:
        """Return the refusal of a request, None when it may go on."""
        header = _authorization(scope)
        try:
            project_id = await self._identify(header)
        except StorageFailure as failure:
            return envelope(503, f"The batch store does not answer: {failure}", code="store_unavailable")
        if project_id is None:
            return None if scope["path"] == STATUS_PATH else _refuse(header)
        scope[PROJECT] = project_id
        return self._limiter.refuse(project_id)

    async def _identify(self, header: str | None) -> str | None:
        """Return the project, None for a stranger. Raises StorageFailure."""
        if await self._ring.is_empty():
            return DEFAULT_PROJECT
        secret = read_bearer(header) if header is not None else None
        key = await self._ring.find(secret) if secret is not None else None
        return key.project_id if key is not None else None


def _authorization(scope: Scope) -> str | None:
    """The header, None when it is not there exactly once."""
    sent = [value for name, value in scope["headers"] if name == b"authorization"]
    return sent[0].decode("latin-1") if len(sent) == 1 else None


def _refuse(header: str | None) -> ASGIApp:
    secret = read_bearer(header) if header is not None else None
    challenge = {"www-authenticate": "Bearer"}
    if secret is None:
        return envelope(401, NO_KEY, headers=challenge)
    message = f"Incorrect API key provided: {mask_secret(secret)}. It is unknown or was revoked."
    return envelope(401, message, code=WRONG_KEY, headers=challenge)
