"""uvicorn's HTTP protocol, with one door more: a route may read the rest of a large body from the socket itself.

Called by uvicorn (api_shim/server.py chooses it); the door is used by api_shim/bodies.py. On the ordinary way uvicorn
copies a body four times and in pieces of at most 256 KB, each with a turn of the event loop: that took as much
processor time as hashing and writing the file together.
"""

import os
import socket
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Key of an ASGI scope's `extensions`; its value is a `SocketDoor`. Missing under any other server.
SOCKET_DOOR = "vllm_batch.socket"
_SKIP_BYTES = 64 << 10


class BodyProtocol(HttpToolsProtocol):
    """One connection. Requests whose body nobody reads that way are uvicorn's alone."""

    _is_skipping = False

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.scheme == "http":  # beneath TLS the socket has no body to read
            # uvicorn declares the scope as a TypedDict, to which no key of ours can be added.
            scope: dict[str, Any] = self.scope  # type: ignore[assignment]
            scope["extensions"] = {SOCKET_DOOR: SocketDoor(self)}

    def on_body(self, body: bytes) -> None:
        if not self._is_skipping:
            super().on_body(body)

    def take(self) -> tuple[bytes, socket.socket]:
        """Return what has come of the body and was not read yet, and the socket with the rest."""
        self.flow.pause_reading()
        pending, self.cycle.body = bytes(self.cycle.body), bytearray()
        return pending, socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno()))

    def give_back(self, taken: int, *, is_whole: bool) -> None:
        """Bring the parser to where the socket is: `taken` bytes further, or at the end of a body that is whole."""
        if self.parser is None:  # the connection is lost
            return
        if is_whole:
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.on_message_complete()
            return
        self._is_skipping = True
        try:
            for start in range(0, taken, _SKIP_BYTES):
                self.parser.feed_data(bytes(min(_SKIP_BYTES, taken - start)))
        finally:
            self._is_skipping = False


class SocketDoor:
    """The rest of one request's body, read from the socket. `open`, then `receive_into` until it is complete, `close`.

    `left` are the bytes that the socket still has of it; never is one more read.
    """

    def __init__(self, protocol: BodyProtocol) -> None:
        self._protocol = protocol
        self._socket: socket.socket | None = None
        self.left = self._taken = 0

    def open(self, left: int) -> bytes:
        """`left`: bytes of the body that were not read yet. Returns those of them that have come already."""
        pending, self._socket = self._protocol.take()
        self.left = left - len(pending)
        return pending

    async def receive_into(self, space: memoryview) -> int:
        """Return how many bytes came; 0 when the client went away. Raises ConnectionError."""
        assert self._socket is not None
        loop: Any = self._protocol.loop
        count: int = await loop.sock_recv_into(self._socket, space[: self.left])
        self.left -= count
        self._taken += count
        return count

    def close(self) -> None:
        """Let uvicorn go on where we stand: it throws away the rest, and reads the next request. Harmless unopened."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._protocol.give_back(self._taken, is_whole=not self.left)
