"""A TCP proxy between the client and the engine that a test can cut, freeze, reset or slow down."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

from tests.stack import free_ports

_HOST = "127.0.0.1"
_ACT_SECONDS = 120
_BLOCK = 64 << 10


class FaultProxy:
    """Forwards connections on `port` to `target` (a port). Runs on a thread of its own until `close`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._delay = 0.0
        self._drops, self._dropped_call = 0, b""
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.port = free_ports(1)[0]  # held: nobody else gets it while the wire is cut
        self._flows = self._do(self._make_gate())
        self._do(self._listen())

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def cut(self) -> None:
        """Refuse connections and close those that are open, until `mend`."""
        self._do(self._cut())

    def blackhole(self) -> None:
        """Take what comes and forward nothing, until `mend`."""
        self._do(self._set_gate(is_open=False))

    def reset(self) -> None:
        """Reset every open connection, once."""
        self._do(self._reset())

    def drop_replies(self, times: int, call: bytes) -> None:
        """Let the next so many requests that begin with `call` through, and cut the connection instead of the reply."""
        self._drops, self._dropped_call = times, call

    @property
    def drops_left(self) -> int:
        return self._drops

    def delay(self, seconds: float) -> None:
        """Hold back every block by so much, until `mend`."""
        self._delay = seconds

    def mend(self) -> None:
        """Work as a wire does."""
        self._delay = 0.0
        self._do(self._set_gate(is_open=True))
        self._do(self._listen())

    def close(self) -> None:
        self._do(self._cut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_ACT_SECONDS)

    async def _make_gate(self) -> asyncio.Event:
        gate = asyncio.Event()
        gate.set()
        return gate

    async def _set_gate(self, *, is_open: bool) -> None:
        if is_open:
            self._flows.set()
        else:
            self._flows.clear()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, _HOST, self.port, backlog=1024)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _reset(self) -> None:
        for writer in list(self._writers):
            plug: socket.socket = writer.get_extra_info("socket")
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(_HOST, self._target)
        except OSError:
            writer.transport.abort()
            return
        with self._known(writer), self._known(back):
            doomed = asyncio.Event()
            ways = (self._pump(reader, back, begun=doomed), self._pump(there, writer, doomed=doomed))
            await asyncio.wait([asyncio.ensure_future(way) for way in ways])

    @contextlib.contextmanager
    def _known(self, writer: asyncio.StreamWriter) -> Iterator[None]:
        self._writers.add(writer)
        try:
            yield
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        begun: asyncio.Event | None = None,
        doomed: asyncio.Event | None = None,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_BLOCK):
                if begun is not None and self._drops and data.startswith(self._dropped_call):
                    self._drops -= 1
                    begun.set()
                if doomed is not None and doomed.is_set():
                    writer.transport.abort()
                    return
                await asyncio.sleep(self._delay)
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
