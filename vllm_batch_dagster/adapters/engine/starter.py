"""Makes sure that the one process of an engine folder runs and answers: adopt it, wait for it, start it, replace it.

Callers hold the start lock, so that one process at a time does any of this.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from vllm_batch_dagster.adapters.engine.client import EngineClient
from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.adapters.engine.folder import EngineFolder, EngineRecord
from vllm_batch_dagster.adapters.engine.launch import DRAIN_SECONDS, Launch
from vllm_batch_dagster.adapters.engine.logtail import last_said, read_tail
from vllm_batch_dagster.adapters.engine.loopback import pick_port
from vllm_batch_dagster.adapters.engine.processes import (
    boot_id,
    kill_group,
    members_of,
    spawn,
    start_of,
)
from vllm_batch_dagster.core.errors import EngineFailure, EngineStartFailed
from vllm_batch_dagster.core.ports import Report

T = TypeVar("T")

REPORT_SECONDS = 5.0
_LOOK_SECONDS = 0.25
_ADOPT_TRIES = 3


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts and stops the engine of one folder."""

    config: EngineConfig
    folder: EngineFolder

    def current(self, launch: Launch) -> EngineRecord | None:
        """Return the living engine of exactly this launch, ready or on its way."""
        record = self.folder.read()
        if record is None or record.fingerprint != launch.fingerprint or not record.is_alive:
            return None
        return record

    async def ensure(self, launch: Launch, report: Report, *, distrusted: str = "") -> EngineRecord:
        """Return the record of an engine that serves `launch`: the living one, or a new one.

        The engine whose serial is `distrusted` is killed however healthy it says it is.
        Raises EngineStartFailed.
        """
        record = self.current(launch)
        if record is not None and record.serial != distrusted and await self._is_usable(record):
            return await self._wait_ready(record, report)
        await self._end(grace=0.0)
        return await self._wait_ready(self.start(launch, report), report)

    async def _is_usable(self, record: EngineRecord) -> bool:
        async with _probing(record) as client:
            for _ in range(_ADOPT_TRIES):
                if await client.is_healthy():
                    return True
                if not record.is_ready:
                    return time.time() - record.started_at < self.config.start_seconds
                await asyncio.sleep(_LOOK_SECONDS)
        return False

    async def stop(self, report: Report) -> None:
        """Let an engine that nobody uses end by itself; kill what is left after that."""
        record = self.folder.read()
        if record is not None and record.is_alive:
            report(f"stopping the engine of {record.model}")
        await self._end(grace=DRAIN_SECONDS if record is not None and record.is_ready else 0.0)

    async def _end(self, grace: float) -> None:
        await _to_end(lambda: self.folder.end_engine(grace))

    def start(self, launch: Launch, report: Report) -> EngineRecord:
        """Start the process and record it, without waiting. There is none. Raises EngineStartFailed."""
        port = pick_port(self.config.port)
        argv = launch.at(port)
        record = EngineRecord(
            serial=uuid.uuid4().hex,
            fingerprint=launch.fingerprint,
            model=launch.model.name,
            command=tuple(argv),
            port=port,
            max_num_seqs=launch.max_num_seqs,
            boot=boot_id(),
            started_at=time.time(),
            log_offset=self.folder.roll_log(),
        )
        self.folder.touch()
        report(f"starting the engine of {launch.model.name} on port {port}; its log is {self.folder.log}")
        try:
            pid = spawn(argv, self.folder.root, launch.env, self.folder.log)
        except OSError as error:
            raise EngineStartFailed(
                f"cannot run {argv[0]!r}: {error}. Run `make setup`, or set ENGINE_PYTHON to the Python that has vLLM."
            ) from error
        record = replace(record, pid=pid, process_start=start_of(pid) or "")
        try:
            self.folder.write(record)
        except OSError as error:
            kill_group(pid)
            raise EngineStartFailed(f"cannot write the engine's record into {self.folder.root}: {error}") from error
        return record

    async def _wait_ready(self, record: EngineRecord, report: Report) -> EngineRecord:
        if record.is_ready:
            return record
        try:
            async with _probing(record) as client:
                await self._wait_health(record, client, report)
                await self._check_served(record, client)
        except EngineStartFailed:
            await self._end(grace=0.0)
            raise
        ready = replace(record, is_ready=True, members=tuple(members_of(record.pid)))
        self.folder.write(ready)
        self.folder.touch()
        report(f"the engine of {record.model} is ready after {time.time() - record.started_at:.0f} s")
        return ready

    async def _wait_health(self, record: EngineRecord, client: EngineClient, report: Report) -> None:
        said_at = time.monotonic()
        while not await client.is_healthy():
            waited = time.time() - record.started_at
            if not record.is_alive:
                raise self._start_failed(record, f"ended after {waited:.0f} s without becoming ready")
            if waited > self.config.start_seconds:
                raise self._start_failed(record, f"was not ready after {waited:.0f} s (ENGINE_START_SECONDS)")
            if time.monotonic() - said_at >= REPORT_SECONDS:
                said_at = time.monotonic()
                self._report_wait(record, waited, report)
            await asyncio.sleep(_LOOK_SECONDS)

    def _report_wait(self, record: EngineRecord, waited: float, report: Report) -> None:
        # Should the leader and we both be killed now, the members on disk tell that the rest is ours.
        self.folder.write(replace(record, members=tuple(members_of(record.pid))))
        said = last_said(self.folder.log, record.log_offset)
        report(f"waiting for the engine of {record.model}: {waited:.0f} s; it says: {said or 'nothing yet'}")

    async def _check_served(self, record: EngineRecord, client: EngineClient) -> None:
        """Another server may have taken the port first, and ours be about to end for that."""
        try:
            served = await client.served_models()
        except EngineFailure as error:
            raise self._start_failed(record, f"answers /health but not /v1/models ({error})") from error
        if record.model not in served or not record.is_alive:
            raise self._start_failed(record, f"port {record.port} serves {', '.join(served)} and is not ours")

    def _start_failed(self, record: EngineRecord, what: str) -> EngineStartFailed:
        tail = "\n".join(read_tail(self.folder.log, record.log_offset)) or "(it wrote nothing)"
        return EngineStartFailed(f"the engine of {record.model} {what}. End of its log {self.folder.log}:\n{tail}")


@contextlib.asynccontextmanager
async def _probing(record: EngineRecord) -> AsyncIterator[EngineClient]:
    client = EngineClient(record.url)
    try:
        yield client
    finally:
        await client.close()


async def _to_end(work: Callable[[], T]) -> T:
    """Run blocking `work` beside the event loop; a cancellation waits until it is over, because locks guard it."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
