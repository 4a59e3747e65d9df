"""The body of a large request in blocks of a few megabytes, read with as little processor time as Python allows.

Called by api_shim/arrivals.py. Two buffers take turns: while a block is hashed and written, the next one fills.
"""

from collections.abc import AsyncGenerator, Iterator

from fastapi import Request
from starlette.requests import ClientDisconnect

from api_shim.protocol import SOCKET_DOOR, SocketDoor

BLOCK_BYTES = 2 << 20

Block = bytes | bytearray


class _Filling:
    """Two buffers of `size` bytes, one of which fills."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._buffers = [bytearray(), bytearray()]  # made when first used: most bodies are small
        self._held = 0

    @property
    def space(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        if not self._buffers[0]:
            self._buffers[0] = bytearray(self._size)
        return memoryview(self._buffers[0])[self._held :]

    def advance(self, count: int) -> Block | None:
        """Count bytes that were put into `space`. Returns the block when it is full."""
        self._held += count
        if self._held < self._size:
            return None
        self._buffers.reverse()
        self._held = 0
        return self._buffers[1]

    def put(self, data: bytes) -> Iterator[Block]:
        """Copy `data` in, and yield each block that it fills."""
        left = memoryview(data)
        while left:
            space = self.space
            count = min(len(space), len(left))
            space[:count] = left[:count]
            left = left[count:]
            if block := self.advance(count):
                yield block

    def flush(self) -> Block:
        """Return what is left, less than a block; empty when nothing is."""
        return bytes(memoryview(self._buffers[0])[: self._held])


async def read_blocks(request: Request, length: int, size: int = BLOCK_BYTES) -> AsyncGenerator[Block, None]:
    """Yield the body in blocks of `size` bytes, the last one shorter. A block holds until the one after the next is
    asked for. Close the iterator when it is left early: `aclosing`.

    `length` is what the request announces, 0 when it does not. Raises ClientDisconnect.
    """
    filling = _Filling(size)
    door: SocketDoor | None = request.scope.get("extensions", {}).get(SOCKET_DOOR)
    left = length
    async for data in request.stream():
        for block in filling.put(data):
            yield block
        left -= len(data)
        if door is not None and left > size:
            break
    if door is not None and left > size:
        try:
            async for block in _read_socket(door, left, filling):
                yield block
        finally:
            door.close()
    if block := filling.flush():
        yield block


async def _read_socket(door: SocketDoor, left: int, filling: _Filling) -> AsyncGenerator[Block, None]:
    for block in filling.put(door.open(left)):
        yield block
    while door.left:
        if not (count := await _receive(door, filling.space)):
            raise ClientDisconnect
        if full := filling.advance(count):
            yield full


async def _receive(door: SocketDoor, space: memoryview) -> int:
    try:
        return await door.receive_into(space)
    except ConnectionError:
        return 0
