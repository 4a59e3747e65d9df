"""Calls to one Label Studio server: the token, time limits, and what an error says. No call is ever repeated here: one
that failed may have been carried out.

Used by the push of tasks (board.py) and by whoever reads annotations. Safe to use from several threads.
"""

import asyncio
import re
import threading
import time
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from vllm_batch_dagster.adapters.label_studio.tokens import AccessToken, Monotonic, is_personal
from vllm_batch_dagster.core.errors import ReviewFailed

CONNECT_SECONDS = 10.0
TOTAL_SECONDS = 60.0
SHOWN_CHARACTERS = 300
_FAULTS = (aiohttp.ClientError, OSError, ValueError)
# A refusal that the same call meets again until somebody changes a setting; all else may pass.
_LASTING = frozenset({400, 401, 403, 404, 405, 413, 422})

_QUOTED_TASK = re.compile(r"\[assume:| :: ")

Params = Mapping[str, str | int]


class LabelStudioSession:
    """A context manager around one connection pool and, for a personal access token, one access token.

    `url` is that of the web page; `key` a legacy token or a personal access token. Every method raises ReviewFailed.
    """

    def __init__(
        self, url: str, key: str, *, seconds: float = TOTAL_SECONDS, monotonic: Monotonic = time.monotonic
    ) -> None:
        self.url, self._key = url.rstrip("/"), key
        self._personal, self._access = is_personal(key), AccessToken(monotonic)
        self._timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="label-studio", daemon=True)
        self._http: aiohttp.ClientSession | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            self._do(self._http.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Carry out on the loop's own thread: the caller's may have a loop of its own, and can be interrupted."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def get(self, path: str, **params: str | int) -> Any:
        """Return the decoded answer of a GET. `path` begins with /api/."""
        return self._do(self._call("GET", path, params, None))

    def post(self, path: str, body: object, **params: str | int) -> Any:
        return self._do(self._call("POST", path, params, body))

    def patch(self, path: str, body: object) -> Any:
        return self._do(self._call("PATCH", path, {}, body))

    def delete(self, path: str) -> None:
        self._do(self._call("DELETE", path, {}, None))

    async def _call(self, method: str, path: str, params: Params, body: object) -> Any:
        answer = await self._send(method, path, params, body, await self._authorization())
        if answer[0] == 401 and self._personal:
            # Not carried out, so it can be sent again: the access token ended early (a restart with another secret).
            self._access.drop()
            answer = await self._send(method, path, params, body, await self._authorization())
        return self._read(method, path, *answer)

    async def _authorization(self) -> str:
        if not self._personal:
            return f"Token {self._key}"
        if not self._access.is_good:
            path = "/api/token/refresh/"
            answer = await self._send("POST", path, {}, {"refresh": self._key}, None)
            self._access.take(str(self._read("POST", path, *answer)["access"]))
        return f"Bearer {self._access.value}"

    async def _send(
        self, method: str, path: str, params: Params, body: object, authorization: str | None
    ) -> tuple[int, bytes]:
        headers = {"content-type": "application/json"} if body is not None else {}
        if authorization is not None:
            headers["authorization"] = authorization
        if self._http is None:
            self._http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), timeout=self._timeout)
        data = None if body is None else msgspec.json.encode(body)
        try:
            async with self._http.request(
                method, self.url + path, params=params, data=data, headers=headers, allow_redirects=False
            ) as answer:
                return answer.status, await answer.read()
        except TimeoutError:
            raise ReviewFailed(f"no answer from Label Studio to {method} {path} in time") from None
        except _FAULTS as fault:
            # Without the cause: a traceback would show the headers of the call.
            raise ReviewFailed(f"no answer from Label Studio to {method} {path}: {self._hide(_name(fault))}") from None

    def _read(self, method: str, path: str, status: int, body: bytes) -> Any:
        if 300 <= status < 400:
            raise ReviewFailed(
                f"Label Studio answered {method} {path} with a redirect: is LABEL_STUDIO_URL right?", may_pass=False
            )
        if status >= 400:
            said = self._hide(_describe(body))
            raise ReviewFailed(
                f"Label Studio answered {status} to {method} {path}: {said}",
                status=status,
                may_pass=status not in _LASTING,
            )
        try:
            return msgspec.json.decode(body) if body else None
        except msgspec.DecodeError:
            raise ReviewFailed(
                f"the answer to {method} {path} is no JSON: is LABEL_STUDIO_URL that of a Label Studio?", may_pass=False
            ) from None

    def _hide(self, text: str) -> str:
        for secret in (self._key, self._access.value):
            text = text.replace(secret, "***") if secret else text
        return text


def _name(fault: Exception) -> str:
    return f"{type(fault).__name__}: {fault}"[:SHOWN_CHARACTERS]


def _describe(body: bytes) -> str:
    """Return what an error's body says, on one line, without the task that it may quote: prompts are not for logs."""
    try:
        said = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return " ".join(body.decode("utf-8", "replace").split())[:SHOWN_CHARACTERS]
    told = " ".join(str(said[key]) for key in ("detail", "validation_errors") if said.get(key))
    return _QUOTED_TASK.split(told)[0].strip()[:SHOWN_CHARACTERS] or "no reason given"
