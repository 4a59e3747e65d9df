"""A hold on our own engine: sends lines to it, and restarts it when it dies or hangs."""

import contextlib
from collections.abc import AsyncIterator

from vllm_batch_dagster.adapters.engine.client import EngineClient
from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.adapters.engine.folder import EngineRecord
from vllm_batch_dagster.adapters.engine.launch import WINDOW_PER_SEQUENCE, Launch
from vllm_batch_dagster.adapters.engine.locks import hold
from vllm_batch_dagster.adapters.engine.logtail import last_said
from vllm_batch_dagster.adapters.engine.recovery import Recovery
from vllm_batch_dagster.adapters.engine.server import Pace, Server
from vllm_batch_dagster.adapters.engine.starter import Starter
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest, Report


class OwnLease:
    """See EngineLease. Enter it with `opened`; the caller holds the use lock around it."""

    def __init__(
        self, config: EngineConfig, starter: Starter, launch: Launch, record: EngineRecord, report: Report
    ) -> None:
        self._pace = Pace(config.health_seconds, config.stall_seconds)
        self._starter = starter
        self._launch = launch
        self._record = record
        self._report = report
        self._server = self._connect()
        self._recovery = Recovery(self._bring_back, config.restarts)

    @property
    def window(self) -> int:
        return WINDOW_PER_SEQUENCE * self._record.max_num_seqs

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator["OwnLease"]:
        self._server.open()
        try:
            yield self
        finally:
            await self._recovery.close()
            await self._server.close()

    async def send(self, request: EngineRequest) -> EngineAnswer:
        return await self._recovery.watch(self._server.send(request))

    async def context_length(self) -> int | None:
        return await self._server.client.context_length()

    async def recover(self, limit: int | None = None) -> str:
        return await self._recovery.run(limit)

    async def _bring_back(self, tries: int) -> str:
        """Connect again to the engine, or to the one that another user has started meanwhile, or start one. Returns
        what can be seen of the old one.

        An engine that was declared down is not trusted again, nor one that failed twice without an answer between.
        """
        serial = self._record.serial
        distrusted = serial if self._server.down is not None or tries > 1 else ""
        start = await hold(self._starter.folder.start_lock, on_wait=lambda _waited: None)
        seen = self._last_words()
        try:
            self._report(f"the engine of {self._launch.model.name} gave no answer: {self._server.down or 'reset'}")
            self._record = await self._starter.ensure(self._launch, self._report, distrusted=distrusted)
        finally:
            start.release()
        if self._record.serial == serial and self._server.down is None:
            return ""  # Only some connections broke: the rest of what is in flight goes on.
        await self._server.close()
        self._server = self._connect()
        self._server.open()
        return seen

    def _last_words(self) -> str:
        state = "its process still ran" if self._record.is_alive else "its process had ended"
        said = last_said(self._starter.folder.log, self._record.log_offset)
        return f"{state}; its log ended with: {said or 'nothing'}"

    def _connect(self) -> Server:
        return Server(
            EngineClient(self._record.url, probe_seconds=self._pace.probe_seconds), self._pace, self._note_use
        )

    def _note_use(self) -> None:
        # A user that is killed leaves no last word: the engine must not look idle since its start.
        with contextlib.suppress(OSError):
            self._starter.folder.touch()
