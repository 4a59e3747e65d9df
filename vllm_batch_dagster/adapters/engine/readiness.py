"""Waits until an engine that was started answers, or says why it does not: by its process, its port and its log."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from vllm_batch_dagster.adapters.engine.client import EngineClient
from vllm_batch_dagster.adapters.engine.folder import EngineFolder, EngineRecord
from vllm_batch_dagster.adapters.engine.logtail import CLASSIFIED_LINES, last_said, read_tail
from vllm_batch_dagster.adapters.engine.processes import members_of
from vllm_batch_dagster.core.errors import EngineFailure
from vllm_batch_dagster.core.ports import Report
from vllm_batch_dagster.core.start_faults import Cause, StartFault, classify_log, read_reduced_length

REPORT_SECONDS = 5.0
_LOOK_SECONDS = 0.25
_ADOPT_TRIES = 3


class NotReady(Exception):
    """The engine that was started will not serve. The message completes "the engine of M ..."; `tail` is its log.
    Control flow between the starter and this module."""

    def __init__(self, what: str, fault: StartFault, tail: Sequence[str]) -> None:
        super().__init__(what)
        self.fault = fault
        self.tail = tail


@dataclass(frozen=True, slots=True)
class Readiness:
    """Looks at the engine of one folder; `start_seconds` is how long it may take."""

    folder: EngineFolder
    start_seconds: float

    async def is_usable(self, record: EngineRecord) -> bool:
        """True when the living engine of `record` answers, or is young enough to be on its way."""
        async with _probing(record) as client:
            for _ in range(_ADOPT_TRIES):
                if await client.is_healthy():
                    return True
                if not record.is_ready:
                    return time.time() - record.started_at < self.start_seconds
                await asyncio.sleep(_LOOK_SECONDS)
        return False

    async def wait(self, record: EngineRecord, report: Report) -> EngineRecord:
        """Return the record of the engine once it serves, written down as ready. Raises NotReady."""
        async with _probing(record) as client:
            await self._wait_health(record, client, report)
            length = await self._check_served(record, client)
        ready = replace(
            record,
            is_ready=True,
            members=tuple(members_of(record.pid)),
            max_model_len=length,
            served_from=self.folder.log_size(),
        )
        self.folder.write(ready)
        self.folder.touch()
        report(f"the engine of {record.model} is ready after {time.time() - record.started_at:.0f} s")
        self._report_length(ready, report)
        return ready

    async def _wait_health(self, record: EngineRecord, client: EngineClient, report: Report) -> None:
        said_at = time.monotonic()
        while not await client.is_healthy():
            waited = time.time() - record.started_at
            if not record.is_alive:
                raise self._failed(record, f"ended after {waited:.0f} s without becoming ready")
            if waited > self.start_seconds:
                what = f"was not ready after {waited:.0f} s (ENGINE_START_SECONDS)"
                raise NotReady(what, StartFault(Cause.TOO_SLOW), self._log(record))
            if time.monotonic() - said_at >= REPORT_SECONDS:
                said_at = time.monotonic()
                self._report_wait(record, waited, report)
            await asyncio.sleep(_LOOK_SECONDS)

    def _report_wait(self, record: EngineRecord, waited: float, report: Report) -> None:
        # Should the leader and we both be killed now, the members on disk tell that the rest is ours.
        self.folder.write(replace(record, members=tuple(members_of(record.pid))))
        said = last_said(self.folder.log, record.log_offset)
        report(f"waiting for the engine of {record.model}: {waited:.0f} s; it says: {said or 'nothing yet'}")

    async def _check_served(self, record: EngineRecord, client: EngineClient) -> int:
        """Return the context length. Another server may have taken the port first, and ours be about to end for it."""
        try:
            served = await client.served_models()
        except EngineFailure as error:
            raise self._failed(record, f"answers /health but not /v1/models ({error})") from error
        if record.model not in served or not record.is_alive:
            what = f"did not get its port: {record.port} serves {', '.join(served)} and is not ours"
            raise NotReady(what, StartFault(Cause.PORT_TAKEN), self._log(record))
        return served[record.model]

    def _report_length(self, record: EngineRecord, report: Report) -> None:
        """A shorter context refuses long requests and cuts long answers: nobody must have to guess it."""
        if cut := read_reduced_length(self._log(record)):
            report(
                f"memory is short: the context of {record.model} is {cut[1]} tokens instead of {cut[0]}; longer "
                "requests are refused, and answers end there"
            )

    def _failed(self, record: EngineRecord, what: str) -> NotReady:
        tail = self._log(record)
        return NotReady(what, classify_log(tail), tail)

    def _log(self, record: EngineRecord) -> list[str]:
        return read_tail(self.folder.log, record.log_offset, CLASSIFIED_LINES)


@contextlib.asynccontextmanager
async def _probing(record: EngineRecord) -> AsyncIterator[EngineClient]:
    client = EngineClient(record.url)
    try:
        yield client
    finally:
        await client.close()
