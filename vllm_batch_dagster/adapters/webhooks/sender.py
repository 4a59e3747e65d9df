"""One attempt to deliver one event: signed, to a checked address, bounded in time and in what is read of the answer.

Called by stages/webhooks.py. Whatever the URL or its receiver does wrong becomes an Outcome.
"""

import asyncio
import ssl
from collections.abc import Sequence
from contextlib import suppress

import aiohttp
from yarl import URL

from vllm_batch_dagster.adapters.webhooks.resolving import AddressRefused, LookUp, look_up, resolve
from vllm_batch_dagster.adapters.webhooks.signing import sign
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.webhook_urls import NO_HOSTS, AllowedHosts, read_webhook_url
from vllm_batch_dagster.core.webhooks import Outcome, is_delivered, webhook_id

USER_AGENT = "vllm-batch-dagster (webhooks)"
CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 10.0
BODY_SECONDS = 2.0
MAX_ANSWER_BYTES = 4096
SHOWN_CHARACTERS = 200

# What a receiver, its certificate, its name or its address can make aiohttp raise.
_FAULTS = (aiohttp.ClientError, OSError, ValueError)


class HttpWebhookSender:
    """See WebhookSender. Holds nothing between attempts; safe to use from many threads at once.

    `ask` looks names up, `tls` verifies certificates (None: with the system's authorities).
    """

    def __init__(
        self, hosts: AllowedHosts = NO_HOSTS, *, ask: LookUp = look_up, tls: ssl.SSLContext | None = None
    ) -> None:
        self._hosts, self._ask, self._tls = hosts, ask, tls

    def send(self, url: str, event_id: str, body: bytes, secrets: Sequence[str], timestamp: int) -> Outcome:
        try:
            read_webhook_url(url, "url", self._hosts)  # the setting may be another one than when it was given
        except InvalidInput as refusal:
            return _failed(refusal.message)
        signed = sign(webhook_id(event_id), timestamp, body, secrets)
        headers = {**signed, "content-type": "application/json", "user-agent": USER_AGENT}
        return asyncio.run(self._attempt(URL(url, encoded=True), body, headers))

    async def _attempt(self, url: URL, body: bytes, headers: dict[str, str]) -> Outcome:
        try:
            async with asyncio.timeout(TOTAL_SECONDS):
                return await self._post(url, body, headers)
        except AddressRefused as refusal:
            return _failed(f"refused: {refusal}")
        except aiohttp.ConnectionTimeoutError:
            return _failed(f"no connection to {url.raw_host} within {CONNECT_SECONDS:.0f} s")
        except TimeoutError:
            return _failed(f"no answer from {url.raw_host} within {TOTAL_SECONDS:.0f} s")
        except _FAULTS as fault:
            return _failed(f"no answer from {url.raw_host}: {_describe(fault)}")

    async def _post(self, url: URL, body: bytes, headers: dict[str, str]) -> Outcome:
        host, port = url.raw_host or "", url.port or 0
        resolver = await resolve(host, port, self._hosts, self._ask)
        connector = aiohttp.TCPConnector(
            resolver=resolver, use_dns_cache=False, force_close=True, ssl=True if self._tls is None else self._tls
        )
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("accept-encoding",),
                auto_decompress=False,  # so that 4 KiB stay 4 KiB
                read_bufsize=MAX_ANSWER_BYTES,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            ) as session,
            session.post(url, data=body, headers=headers, allow_redirects=False) as answer,
        ):
            return await _read(answer)


async def _read(answer: aiohttp.ClientResponse) -> Outcome:
    """Return what an answer means. The status says it; the body of a refusal is only looked at for people."""
    if is_delivered(answer.status):
        return Outcome(is_delivered=True, status=answer.status)
    if 300 <= answer.status < 400:
        return _failed(f"answered {answer.status}: a redirect, which is not followed", answer.status)
    said = b""
    with suppress(TimeoutError, *_FAULTS):  # the status is known, whatever becomes of the rest
        async with asyncio.timeout(BODY_SECONDS):
            said = await answer.content.read(MAX_ANSWER_BYTES)
    return _failed(f"answered {answer.status} {_one_line(said.decode('utf-8', 'replace'))}".rstrip(), answer.status)


def _describe(fault: Exception) -> str:
    """What went wrong, without the URL: its path may be all that protects the receiver."""
    text = "the answer is no HTTP" if isinstance(fault, aiohttp.ClientResponseError) else str(fault)
    return f"{type(fault).__name__}: {_one_line(text)}"


def _one_line(text: str) -> str:
    visible = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(visible.split())[:SHOWN_CHARACTERS]


def _failed(reason: str, status: int | None = None) -> Outcome:
    return Outcome(is_delivered=False, status=status, reason=reason)
