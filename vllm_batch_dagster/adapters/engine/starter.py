"""Makes sure that the one process of an engine folder runs and answers: adopt it, wait for it, start it, replace it.

A start that fails for want of memory is tried again one rung lower: `rungs.Ladder` says which. Callers hold the start
lock, so that one process at a time does any of this.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.adapters.engine.folder import EngineFolder, EngineRecord
from vllm_batch_dagster.adapters.engine.launch import DRAIN_SECONDS, Launch
from vllm_batch_dagster.adapters.engine.logtail import LAST_LINES
from vllm_batch_dagster.adapters.engine.loopback import pick_port
from vllm_batch_dagster.adapters.engine.processes import boot_id, kill_group, spawn, start_of
from vllm_batch_dagster.adapters.engine.readiness import NotReady, Readiness
from vllm_batch_dagster.adapters.engine.rungs import Climb, Ladder
from vllm_batch_dagster.core.errors import EngineStartFailed, StorageFailure
from vllm_batch_dagster.core.ladder import Rung
from vllm_batch_dagster.core.ports import Report
from vllm_batch_dagster.core.start_advice import advise
from vllm_batch_dagster.core.start_faults import Cause

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts and stops the engine of one folder."""

    config: EngineConfig
    folder: EngineFolder
    ladder: Ladder

    def current(self, launch: Launch) -> EngineRecord | None:
        """Return the living engine of exactly this launch, ready or on its way."""
        record = self.folder.read()
        if record is None or record.fingerprint != launch.fingerprint or not record.is_alive:
            return None
        return record

    async def ensure(self, launch: Launch, report: Report, *, distrusted: str = "") -> EngineRecord:
        """Return the record of an engine that serves `launch`: the living one, or a new one.

        The engine whose serial is `distrusted` is killed however healthy it says it is.
        Raises EngineStartFailed when no rung of the ladder, or none of `start_tries`, gives an engine.
        """
        readiness = Readiness(self.folder, self.config.start_seconds)
        record = self.current(launch)
        if record is None or record.serial == distrusted or not await readiness.is_usable(record):
            rung = await _to_end(lambda: self._bury(launch, may_probe=not distrusted))
            record = self.start(launch, report, rung)
        return record if record.is_ready else await self._climb(launch, record, readiness, report)

    def _bury(self, launch: Launch, *, may_probe: bool) -> Rung:
        """End what is left of the engine, and return the rung of the next one."""
        self.ladder.note_death(launch)
        self.folder.end_engine(0.0)
        return self.ladder.choose(launch, may_probe=may_probe)

    async def _climb(self, launch: Launch, record: EngineRecord, readiness: Readiness, report: Report) -> EngineRecord:
        """Wait for the engine that was started; when it fails, start it anew at the next rung."""
        climb: Climb | None = None
        while True:
            try:
                ready = await readiness.wait(record, report)
            except NotReady as failure:
                if climb is None:
                    climb = await _to_end(lambda: self.ladder.begin(launch))
                record = await self._step(climb, record, failure, report)
            else:
                await self._settle(launch, ready, climb)
                return ready

    async def _step(self, climb: Climb, record: EngineRecord, failure: NotReady, report: Report) -> EngineRecord:
        """Start the engine at the rung that answers its failure. Raises EngineStartFailed when there is none."""
        await _to_end(lambda: self.folder.end_engine(0.0))
        fault = failure.fault
        rung = climb.after(record.rung or climb.launch.top, fault)
        if rung is None:
            raise self._give_up(record, climb, failure) from None
        report(f"the engine of {record.model} {failure}: {fault.quote or fault.cause.value}")
        return self.start(climb.launch, report, rung, any_port=fault.cause is Cause.PORT_TAKEN)

    async def _settle(self, launch: Launch, ready: EngineRecord, climb: Climb | None) -> None:
        rung = ready.rung or launch.top
        await _to_end(lambda: self.ladder.settle(launch, rung, climb.reason_for(rung) if climb else None))

    def _give_up(self, record: EngineRecord, climb: Climb, failure: NotReady) -> EngineStartFailed:
        fault = failure.fault
        advice = advise(fault)
        said = [
            f"the engine of {record.model} {failure}. {advice.meaning}",
            *([f"vLLM says: {fault.quote}"] if fault.quote else []),
            advice.mend,
            f"Tried: {climb.describe()}. Its log is {self.folder.log}",
        ]
        if fault.cause in (Cause.UNKNOWN, Cause.ARGUMENT, Cause.TOO_SLOW):
            said += ["The end of it:", *(failure.tail[-LAST_LINES:] or ["(it wrote nothing)"])]
        return EngineStartFailed("\n".join(said), cause=fault.cause.value, may_pass=advice.may_pass)

    async def stop(self, launch: Launch, report: Report) -> None:
        """Let an engine that nobody uses end by itself, before one of `launch` is started; kill what is left."""
        record = self.folder.read()
        if record is not None and record.is_alive:
            report(f"stopping the engine of {record.model}")
        grace = DRAIN_SECONDS if record is not None and record.is_ready else 0.0
        await _to_end(lambda: self.ladder.note_death(launch))
        await _to_end(lambda: self.folder.end_engine(grace))

    def warm(self, launch: Launch, report: Report) -> None:
        """Start the engine without waiting for it. There is none. Blocks for a moment. Raises as `start` does."""
        self.ladder.note_death(launch)
        self.start(launch, report, self.ladder.choose(launch, may_probe=True))

    def start(self, launch: Launch, report: Report, rung: Rung, *, any_port: bool = False) -> EngineRecord:
        """Start the process at `rung` and record it, without waiting. There is none.

        Raises EngineStartFailed, StorageFailure when the record cannot be written.
        """
        port = pick_port(0 if any_port else self.config.port)
        argv = launch.at(port, rung)
        words = "" if rung == launch.top else rung.describe(launch.top)
        record = EngineRecord(
            serial=uuid.uuid4().hex,
            fingerprint=launch.fingerprint,
            model=launch.model.name,
            command=tuple(argv),
            port=port,
            max_num_seqs=rung.max_num_seqs,
            boot=boot_id(),
            started_at=time.time(),
            log_offset=self.folder.roll_log(),
            rung=rung,
            rung_words=words,
        )
        self.folder.touch()
        lower = f" with {words}" if words else ""
        report(f"starting the engine of {launch.model.name} on port {port}{lower}; its log is {self.folder.log}")
        return self._spawn(record, launch, rung)

    def _spawn(self, record: EngineRecord, launch: Launch, rung: Rung) -> EngineRecord:
        program = record.command[0]
        # vLLM would leave the sockets of a killed engine in the temporary folder (VLLM_RPC_BASE_PATH, vllm/envs.py). A
        # name within the engine's working folder: the whole path may be longer than the 107 bytes of a socket's.
        env = {**launch.env_at(rung), "VLLM_RPC_BASE_PATH": self.folder.sockets.name}
        try:
            pid = spawn(record.command, self.folder.root, env, self.folder.log)
        except OSError as error:
            raise EngineStartFailed(
                f"cannot run {program!r}: {error}. Run `make setup`, or set ENGINE_PYTHON to the Python that has vLLM.",
                cause=Cause.INSTALLATION.value,
                may_pass=False,
            ) from error
        record = replace(record, pid=pid, process_start=start_of(pid) or "")
        try:
            self.folder.write(record)
        except StorageFailure:
            kill_group(pid)
            raise
        return record


async def _to_end(work: Callable[[], T]) -> T:
    """Run blocking `work` beside the event loop; a cancellation waits until it is over, because locks guard it."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
