"""Clients that ask again and again, and how long each answer took. Closed loop: none asks before its last answer came.

A poller is one client with one kept connection. It asks, reads the answer, and asks again a second after it asked
before; so N pollers make N requests a second, spread over the second, as long as the server keeps up.
"""

import asyncio
import math
import time
from collections.abc import Sequence

import aiohttp

from bench.errors import BenchFailed

PERIOD_SECONDS = 1.0
_ANSWER_SECONDS = 30.0


def poll(url: str, pollers: int, seconds: float) -> list[float]:
    """Let `pollers` clients ask `url` for `seconds`. Returns the seconds of each answer.

    Raises BenchFailed for any answer but a 200.
    """
    return asyncio.run(_poll_all(url, pollers, seconds))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that `share` of all values do not exceed (nearest rank). Raises ValueError when empty."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


async def _poll_all(url: str, pollers: int, seconds: float) -> list[float]:
    end = time.monotonic() + seconds
    clients = [_poll(url, number / pollers * PERIOD_SECONDS, end) for number in range(pollers)]
    return [taken for each in await asyncio.gather(*clients) for taken in each]


async def _poll(url: str, delay: float, end: float) -> list[float]:
    """One client. Its first request, which opens the connection, does not count."""
    timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await asyncio.sleep(delay)
        taken = [await _ask(session, url)]
        due = time.monotonic()
        while (due := max(due + PERIOD_SECONDS, time.monotonic())) < end:
            await asyncio.sleep(due - time.monotonic())
            taken.append(await _ask(session, url))
    return taken[1:]


async def _ask(session: aiohttp.ClientSession, url: str) -> float:
    began = time.perf_counter()
    async with session.get(url) as answer:
        await answer.read()
        if answer.status != 200:
            raise BenchFailed(f"GET {url} answered {answer.status}")
    return time.perf_counter() - began
