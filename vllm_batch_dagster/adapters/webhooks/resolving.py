"""From a host to the addresses that a webhook may connect to: each is checked, and the connection is pinned to them.

A name is looked up once per attempt. What was checked is what is connected to, so a name that changes its address in
between (DNS rebinding) changes nothing.
"""

import asyncio
import concurrent.futures
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TypeAlias

from aiohttp.abc import AbstractResolver, ResolveResult

from vllm_batch_dagster.core.webhook_urls import SETTING, AllowedHosts, is_reachable

Found: TypeAlias = Sequence[tuple[int, str]]  # (family, address as text)
LookUp: TypeAlias = Callable[[str, int], Found]


class AddressRefused(Exception):
    """The host has no address, or one that webhooks may not reach. The text tells no address: a tenant may read it,
    who must not learn what the names of this network are."""


def look_up(host: str, port: int) -> Found:
    """Ask the system. It also reads addresses in any notation. Raises OSError, UnicodeError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(int(family), str(place[0])) for family, _, _, _, place in found]


async def resolve(host: str, port: int, hosts: AllowedHosts, ask: LookUp = look_up) -> "PinnedResolver":
    """Return a resolver that knows the checked addresses of `host`. Raises AddressRefused if one of them may not be
    reached."""
    try:
        found = await _in_thread(lambda: ask(host, port))
    except (OSError, UnicodeError) as failure:
        raise AddressRefused(f"the host {host} cannot be resolved ({failure})") from failure
    if not found or not all(is_reachable(ip_address(address), host, hosts) for _, address in found):
        raise AddressRefused(f"the host {host} has an address that is not on the public internet, see {SETTING}")
    return PinnedResolver(tuple(found))


@dataclass(frozen=True, slots=True)
class PinnedResolver(AbstractResolver):
    """Gives the connection the addresses that were checked, whatever it asks for."""

    addresses: tuple[tuple[int, str], ...]

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kind, proto=0, flags=int(socket.AI_NUMERICHOST)
            )
            for kind, address in self.addresses
        ]

    async def close(self) -> None:
        """Nothing is held."""


async def _in_thread(work: Callable[[], Found]) -> Found:
    """Run `work` on a thread that nobody waits for: a look-up that hangs ends long after our time-out, and the threads
    of a pool would be joined."""
    answer: concurrent.futures.Future[Found] = concurrent.futures.Future()
    answer.set_running_or_notify_cancel()

    def run() -> None:
        try:
            answer.set_result(work())
        except Exception as failure:  # noqa: BLE001 - raised again where it is awaited
            answer.set_exception(failure)

    threading.Thread(target=run, daemon=True, name="webhook-look-up").start()
    return await asyncio.wrap_future(answer)
