"""Runs an inference on its own thread and event loop, and hands what happens to the asset's thread in order.

The asset's thread writes events to Dagster's storage, which takes tens of milliseconds; meanwhile requests must keep
flowing. A cancellation reaches the asset's thread as a BaseException: leaving the `with` block then stops the loop.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from vllm_batch_dagster.core.models import StopReason
from vllm_batch_dagster.core.pauses import Pause
from vllm_batch_dagster.core.ports import Report
from vllm_batch_dagster.stages.inference import ChunkDone, RangeInference

_POLL_SECONDS = 0.5

MakeInference = Callable[[Callable[[ChunkDone], None], Report], RangeInference]


@dataclass(frozen=True, slots=True)
class _Ended:
    stopped: StopReason | Pause | None = None
    error: BaseException | None = None


class BackgroundInference:
    """`make` builds the inference from the two callbacks that it must use; they are safe on any thread."""

    def __init__(self, make: MakeInference, report: Report) -> None:
        self._make, self._report = make, report
        self._events: queue.SimpleQueue[ChunkDone | str | _Ended] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="inference")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[StopReason | Pause | None] | None = None
        self._started = threading.Event()
        self.stopped: StopReason | Pause | None = None

    def __enter__(self) -> "BackgroundInference":
        self._thread.start()
        try:
            self._started.wait()
        except BaseException:
            # An interrupt just here would leave the thread behind: `with` calls __exit__ only after __enter__.
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        """Cancel the inference and wait for its thread."""
        self._started.wait()
        if self._loop is not None and self._task is not None:
            # The loop is closed already when the inference has just ended.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def finished_chunks(self) -> Iterator[ChunkDone]:
        """Yield chunks as they are published; then set `stopped`. Raises what the inference raised."""
        while True:
            try:
                event = self._events.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(event, str):
                self._report(event)
            elif isinstance(event, ChunkDone):
                yield event
            elif event.error is not None:
                raise event.error
            else:
                self.stopped = event.stopped
                return

    def _run(self) -> None:
        try:
            self._events.put(_Ended(stopped=asyncio.run(self._infer())))
        except BaseException as error:  # noqa: BLE001 - handed to the asset's thread, which raises it
            self._events.put(_Ended(error=error))
        finally:
            self._started.set()

    async def _infer(self) -> StopReason | Pause | None:
        self._loop = asyncio.get_running_loop()
        inference = self._make(self._events.put, self._events.put)
        self._task = asyncio.create_task(inference.run())
        self._started.set()
        return await self._task
