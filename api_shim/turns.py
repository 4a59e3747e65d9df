"""One at a time for each key: calls that would do the same long work twice wait for each other instead. One event loop.

Used by api_shim/uploads.py; between processes the batch store decides.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import Lock


class Turns:
    """A lock per key, which exists as long as somebody holds it or waits."""

    def __init__(self) -> None:
        self._locks: dict[str, Lock] = {}
        self._users: dict[str, int] = {}

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """Wait until nobody else holds `key`."""
        lock = self._locks.setdefault(key, Lock())
        self._users[key] = self._users.get(key, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]
