"""Infers a contiguous range of chunks: line bytes to the engine, answer bytes to the journal, chunk after chunk.

One window of requests spans the whole range, so the engine never drains at a chunk border (vllm-engine report 4.3).
Each chunk is published as soon as its last answer is durable. Called by the `chunk_results` asset; what happens when
anything dies in the middle is in docs/data-path.md.
"""

import asyncio
from collections.abc import Callable, Generator, Sequence
from functools import partial

from vllm_batch_dagster.core.errors import ConfigurationError, EngineFailure, StorageFailure
from vllm_batch_dagster.core.models import Batch, Chunk, Model, StopReason, stop_reason
from vllm_batch_dagster.core.pauses import Pause
from vllm_batch_dagster.core.ports import EngineAnswer, EngineLease, EngineRequest, Report
from vllm_batch_dagster.core.repair import read_plan
from vllm_batch_dagster.core.retry import Verdict
from vllm_batch_dagster.stages.attempts import ChunkAttempt, PendingLine
from vllm_batch_dagster.stages.flight import Flight
from vllm_batch_dagster.stages.pausing import RunGate, RunPaused
from vllm_batch_dagster.stages.quarantine import Quarantine, isolate_line
from vllm_batch_dagster.stages.range_work import ChunkDone, InferencePolicy, InferencePorts, RangeWork
from vllm_batch_dagster.stages.repairing import Repairer
from vllm_batch_dagster.stages.tasks import BatchStopped, finish_on_thread, first_error

__all__ = ["ChunkDone", "InferencePolicy", "InferencePorts", "RangeInference"]


class RangeInference:
    """One run over `chunks` of `batch`, all of them for `model`.

    `fresh` holds the indexes of chunks whose earlier answers are not wanted. `on_done` is called for each published
    chunk, `report` with sentences for the log. `run` returns why it stopped early, or None when every chunk was
    published.
    """

    def __init__(
        self,
        ports: InferencePorts,
        policy: InferencePolicy,
        batch: Batch,
        model: Model,
        chunks: Sequence[Chunk],
        *,
        fresh: frozenset[int],
        run_id: str,
        on_done: Callable[[ChunkDone], None],
        report: Report,
    ) -> None:
        self._ports, self._policy, self._batch, self._model = ports, policy, batch, model
        self._chunks, self._report = chunks, report
        self._range = RangeWork(ports, batch, chunks, fresh=fresh, run_id=run_id, on_done=on_done)
        self._lines: Generator[PendingLine, None, None] | None = None
        self._flight = Flight(1)
        self._turn = asyncio.Lock()
        self._commit_now = asyncio.Event()
        self._whole: asyncio.Queue[ChunkAttempt] = asyncio.Queue()
        self._all_published = asyncio.Event()
        self._gate = RunGate(ports.pause_board, batch, chunks, model, policy.pauses, report)
        self._has_lease = False
        self._quarantine: Quarantine | None = None
        self._repairer = Repairer(read_plan(batch.metadata))

    async def run(self) -> StopReason | Pause | None:
        """Infer every chunk. Raises EngineFailure when the engine dies under the work and attempts are left; the chunks
        published so far stay published, and answers in the journals are not asked for again."""
        if not self._chunks:
            return None
        try:
            await self._infer()
        except (EngineFailure, ConfigurationError, StorageFailure) as error:
            if (pause := self._gate.trip_for(error, self._has_lease)) is not None:
                self._range.settle_pause()
                return pause
            if not isinstance(error, EngineFailure):
                raise
            self._range.settle_engine_failure(error, self._policy.chunk_attempts)
        except RunPaused:
            self._range.settle_pause()
            return self._gate.pause
        except BatchStopped:
            return self._range.settle_stop()
        finally:
            if self._lines is not None:
                self._lines.close()  # it holds the input file open
            self._range.close()
            if self._quarantine is not None:
                self._quarantine.close()
        return None

    async def _infer(self) -> None:
        await self._gate.enter()
        async with first_error(asyncio.TaskGroup()) as group:
            # From the start: a batch may be cancelled while the engine starts, or waits for another model's users.
            watcher = group.create_task(self._watch_batch())
            async with self._ports.engines.lease(self._model, self._report) as lease:
                self._has_lease = True
                await self._infer_with(lease, group)
            watcher.cancel()
        await self._gate.settle()

    async def _infer_with(self, lease: EngineLease, group: asyncio.TaskGroup) -> None:
        suspects = self._ports.workspace.suspects_path(self._batch.id)
        quarantine = await finish_on_thread(Quarantine, suspects, isolate_line, self._report)
        self._quarantine, window = quarantine, max(1, lease.window)
        self._flight = Flight(window)
        quarantine.begin(window)
        keepers = [group.create_task(self._commit_forever()), group.create_task(self._publish_forever())]
        workers = [group.create_task(self._work(lease, quarantine)) for _ in range(window)]
        await asyncio.gather(*workers)
        if self._gate.is_over:
            await self._end_early(keepers)
        quarantine.conclude()
        self._commit_now.set()
        await self._all_published.wait()
        for keeper in keepers:
            keeper.cancel()

    async def _end_early(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        """Make the last answers durable. Raises RunPaused unless they were the last of all."""
        for keeper in keepers:
            keeper.cancel()
        await asyncio.wait(keepers)
        for attempt in self._range.attempts_at_work():
            await self._commit(attempt)
            if attempt.is_durable:
                await self._publish(attempt)
        if not self._range.is_published:
            raise RunPaused

    async def _next_line(self) -> PendingLine | None:
        """Return the next line without an answer, None when none is left. An attempt at a chunk begins when its first
        line is due, on a thread: a fast engine would drain while the loop waits for the store."""
        while (line := self._begun_line()) is None:
            async with self._turn:
                if (line := self._begun_line()) is not None:
                    return line
                if (chunk := self._range.next_chunk()) is None:
                    return None
                attempt = await finish_on_thread(self._range.begin, chunk)
                self._report(attempt.describe())
                self._commit_now.set()
                self._lines = attempt.pending_lines()
        return line

    def _begun_line(self) -> PendingLine | None:
        return next(self._lines, None) if self._lines is not None else None

    async def _work(self, lease: EngineLease, quarantine: Quarantine) -> None:
        while await self._may_send() and (line := await self._pull(quarantine)) is not None:
            if await self._repairer.settle(line, lease, partial(self._ask, lease, quarantine, line)):
                self._gate.has_answer = True
            is_crowded = self._flight.land(line.attempt.index)
            if is_crowded or line.attempt.is_answered or line.attempt.uncommitted >= self._policy.commit_records:
                self._commit_now.set()

    async def _may_send(self) -> bool:
        await self._flight.take_off()
        return await self._gate.admits()

    async def _pull(self, quarantine: Quarantine) -> PendingLine | None:
        with quarantine.pulling():
            return await self._next_line()

    async def _ask(
        self, lease: EngineLease, quarantine: Quarantine, line: PendingLine, body: bytes
    ) -> tuple[EngineAnswer, Verdict, int] | None:
        """Send a line as `body` until it has an answer that counts; None when it kills the engine. Raises EngineFailure
        when the engine cannot be brought back."""
        request = EngineRequest(line.endpoint, body, line.request_id, line.attempt.index)
        faults = tries = 0
        while await quarantine.admits(line):
            tries += 1
            if (said := await quarantine.send(lease, request, line)) is None:
                continue
            answer, verdict = said
            faults += verdict is Verdict.FAULT
            if verdict in (Verdict.SUCCESS, Verdict.REJECTED) or self._policy.retry.is_spent(faults):
                return answer, verdict, tries
            await asyncio.sleep(self._policy.retry.delay(faults or tries))
        return None

    async def _commit_forever(self) -> None:
        """Make answers durable at most `commit_seconds` late, and hand over the chunks whose last answer is durable."""
        handed_over: set[int] = set()
        while True:
            try:
                async with asyncio.timeout(self._policy.commit_seconds):
                    await self._commit_now.wait()
            except TimeoutError:
                pass
            self._commit_now.clear()
            for attempt in self._range.attempts_at_work():
                if attempt.index in handed_over:
                    continue
                await self._commit(attempt)
                if attempt.is_durable:
                    handed_over.add(attempt.index)
                    self._whole.put_nowait(attempt)

    async def _publish_forever(self) -> None:
        """Publish chunks one after the other, beside the commits: reading a large chunk back takes a while, and the
        lines of the next one wait for places in the window that only a commit gives back."""
        while True:
            await self._publish(await self._whole.get())

    async def _publish(self, attempt: ChunkAttempt) -> None:
        self._range.mark_done(attempt, await finish_on_thread(attempt.publish))
        if self._range.is_published:
            self._all_published.set()

    async def _commit(self, attempt: ChunkAttempt) -> None:
        landed = self._flight.landed(attempt.index)
        await finish_on_thread(attempt.commit, attempt.take_commit())
        self._flight.release(landed)

    async def _watch_batch(self) -> None:
        """Mirror the progress into the store, and stop the run when the batch is cancelled or expires."""
        misses = 0
        while True:
            await asyncio.sleep(self._policy.poll_seconds)
            try:
                await self._look_at_batch()
                misses = 0
            except StorageFailure:
                # A database that restarts must not cost what is in flight.
                misses += 1
                if misses > self._policy.lost_polls:
                    raise

    async def _look_at_batch(self) -> None:
        batch = await asyncio.to_thread(self._ports.store.batches.get, self._batch.id)
        if stop_reason(batch, self._ports.clock()):
            raise BatchStopped
        for attempt in self._range.attempts_at_work():
            await asyncio.to_thread(attempt.mirror_progress)
        await self._gate.look()
        if self._gate.is_over and not self._has_lease:
            raise RunPaused
