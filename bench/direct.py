"""Sends request bodies straight to a running engine: the pure inference time, without our product."""

import asyncio
import time
from collections.abc import Sequence

import aiohttp

from bench.errors import BenchFailed


def infer_directly(engine_url: str, bodies: Sequence[bytes], window: int) -> float:
    """Return the seconds from the first request to the last answer with `window` requests in flight."""
    return asyncio.run(_infer(f"{engine_url}/v1/chat/completions", bodies, window))


async def _infer(url: str, bodies: Sequence[bytes], window: int) -> float:
    waiting = iter(bodies)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"Content-Type": "application/json"},
    ) as session:

        async def work() -> None:
            for body in waiting:
                async with session.post(url, data=body) as response:
                    said = await response.read()
                    if response.status != 200:
                        raise BenchFailed(f"the engine answered {response.status}: {said[:300]!r}")

        began = time.monotonic()
        await asyncio.gather(*(work() for _ in range(min(window, len(bodies)))))
        return time.monotonic() - began
