"""The body of an upload on its way from the socket to the disk, block by block, with a clean end whatever happens.

Called by the routes that take contents: api_shim/files.py, api_shim/uploads.py.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from threading import Lock
from typing import Generic, Protocol, TypeVar

from anyio import CancelScope, to_thread
from fastapi import Request

from api_shim.bodies import Block, read_blocks
from api_shim.deps import Services
from api_shim.multipart import UploadForm
from vllm_batch_dagster.core.creation import missing_parameter

# Room for boundaries and fields when a Content-Length is held against a limit.
FORM_OVERHEAD_BYTES = 1 << 20


class Receipt(Protocol):
    """What the contents are written to. Nothing of it stays after `abandon`, unless it was finished."""

    def write(self, data: Block) -> None: ...
    def abandon(self) -> None: ...


R = TypeVar("R", bound=Receipt)
T = TypeVar("T")


class Arrival(Generic[R, T]):
    """One upload from its first byte to what is kept of it. Every method may block: call them in a thread.

    `open_receipt` is called when the contents begin, `keep` when the form is complete. A cancelled request may leave
    `feed` running in its thread, so `abandon` waits for it and ends the upload.
    """

    def __init__(
        self,
        boundary: bytes,
        contents: str,
        open_receipt: Callable[[UploadForm], R],
        keep: Callable[[UploadForm, R], T],
    ) -> None:
        self._form = UploadForm(boundary, self._open, contents)
        self._contents, self._open_receipt, self._keep = contents, open_receipt, keep
        self._receipt: R | None = None
        self._turn = Lock()
        self._over = False

    def feed(self, block: Block) -> None:
        """Raises InvalidInput, StorageFailure."""
        with self._turn:
            if not self._over:
                self._form.feed(block)

    def finish(self) -> T:
        """Keep the contents durably. Raises InvalidInput, StorageFailure."""
        with self._turn:
            self._form.close()
            if self._receipt is None:
                raise missing_parameter(self._contents)
            return self._keep(self._form, self._receipt)

    def abandon(self) -> None:
        """Leave nothing on disk. Harmless after `finish`."""
        with self._turn:
            self._over = True
            if self._receipt is not None:
                self._receipt.abandon()

    def _open(self) -> R:
        self._receipt = self._open_receipt(self._form)
        return self._receipt


async def take_in(request: Request, arrival: Arrival[R, T], services: Services) -> T:
    """Feed the body of the request to `arrival` and return what it keeps."""
    with services.arrivals.counted():
        try:
            await _feed_all(request, arrival, services)
            return await to_thread.run_sync(arrival.finish, limiter=services.disk)
        except BaseException:
            with CancelScope(shield=True):  # a client that goes away must not keep its partial file here
                await to_thread.run_sync(arrival.abandon, limiter=services.disk)
            raise


async def _feed_all(request: Request, arrival: Arrival[R, T], services: Services) -> None:
    """Feed block after block, and collect the next one meanwhile: network and disk work at the same time."""
    feeding: asyncio.Task[None] | None = None
    try:
        async with aclosing(read_blocks(request, announced_bytes(request))) as blocks:
            async for block in blocks:
                if feeding is not None:
                    await feeding
                feeding = asyncio.create_task(to_thread.run_sync(arrival.feed, block, limiter=services.disk))
        if feeding is not None:
            await feeding
    finally:
        if feeding is not None:
            with CancelScope(shield=True):
                await asyncio.wait([feeding])
            if not feeding.cancelled():
                feeding.exception()  # seen by now, or second to another: what came first is raised


def announced_bytes(request: Request) -> int:
    """What the request says its body has; 0 when it does not say."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
