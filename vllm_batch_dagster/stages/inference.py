"""Infers a contiguous range of chunks: line bytes to the engine, answer bytes to the journal, chunk after chunk.

One window of requests spans the whole range, so the engine never drains at a chunk border (vllm-engine report 4.3).
Each chunk is published as soon as its last answer is durable. Called by the `chunk_results` asset; what happens when
anything dies in the middle is in docs/data-path.md.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable, StorageFailure
from vllm_batch_dagster.core.models import Batch, Chunk, ChunkSummary, Model, StopReason, stop_reason
from vllm_batch_dagster.core.ports import (
    BatchStore,
    Clock,
    EngineAnswer,
    EngineLease,
    EngineManager,
    EngineRequest,
    FileStore,
    Report,
    Workspace,
)
from vllm_batch_dagster.core.retry import RetryPolicy, Verdict, judge
from vllm_batch_dagster.stages.attempts import ChunkAttempt, PendingLine, give_up_chunk

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InferencePolicy:
    """`chunk_attempts` bounds attempts that end in an engine failure; the commit limits are the journal's.

    Every `poll_seconds` a run looks whether its batch goes on; it gives up after `lost_polls` looks in a row that
    the store did not answer.
    """

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    chunk_attempts: int = 3
    commit_seconds: float = 0.2
    commit_records: int = 256
    poll_seconds: float = 1.0
    lost_polls: int = 60


@dataclass(frozen=True, slots=True)
class InferencePorts:
    """What inference needs from the outside world."""

    store: BatchStore
    files: FileStore
    workspace: Workspace
    engines: EngineManager
    clock: Clock


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """A published chunk, ready to be shown. `epoch` is the attempt that the result belongs to."""

    index: int
    epoch: int
    summary: ChunkSummary


class _Stopped(Exception):
    """The batch was cancelled or its window closed. Control flow inside this module only."""


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
        self._chunks, self._fresh, self._run_id = chunks, fresh, run_id
        self._on_done, self._report = on_done, report
        self._waiting = iter(chunks)
        self._lines: Iterator[PendingLine] = iter(())
        self._turn = asyncio.Lock()
        self._begun: dict[int, ChunkAttempt] = {}
        self._published: set[int] = set()
        self._commit_now = asyncio.Event()
        self._all_published = asyncio.Event()

    async def run(self) -> StopReason | None:
        """Infer every chunk. Raises EngineFailure when the engine cannot be had and attempts are left; the chunks
        published so far stay published, and answers in the journals are not asked for again."""
        if not self._chunks:
            return None
        try:
            async with _first_error(asyncio.TaskGroup()) as group:
                # From the start: a batch may be cancelled while the engine starts, or waits for another model's users.
                watcher = group.create_task(self._watch_batch())
                async with self._ports.engines.lease(self._model, self._report) as lease:
                    await self._infer_with(lease, group)
                watcher.cancel()
        except EngineFailure as error:
            self._settle_engine_failure(error)
        except _Stopped:
            return self._settle_stop()
        finally:
            self._close_attempts()
        return None

    async def _infer_with(self, lease: EngineLease, group: asyncio.TaskGroup) -> None:
        committer = group.create_task(self._commit_forever())
        workers = [group.create_task(self._work(lease)) for _ in range(max(1, lease.window))]
        await asyncio.gather(*workers)
        self._commit_now.set()
        await self._all_published.wait()
        committer.cancel()

    async def _next_line(self) -> PendingLine | None:
        """Return the next line without an answer, None when none is left. An attempt at a chunk begins when its first
        line is due, on a thread: a fast engine would drain while the loop waits for the store."""
        while (line := next(self._lines, None)) is None:
            async with self._turn:
                if (line := next(self._lines, None)) is not None:
                    return line
                if (chunk := next(self._waiting, None)) is None:
                    return None
                attempt = await _finish_on_thread(self._begin, chunk)
                self._report(attempt.describe())
                self._commit_now.set()
                self._lines = attempt.pending_lines()
        return line

    def _begin(self, chunk: Chunk) -> ChunkAttempt:
        ports = self._ports
        attempt = ChunkAttempt.begin(
            ports.store,
            ports.files,
            ports.workspace,
            self._batch,
            chunk,
            fresh=chunk.index in self._fresh,
            run_id=self._run_id,
            clock=ports.clock,
        )
        self._begun[chunk.index] = attempt
        return attempt

    async def _work(self, lease: EngineLease) -> None:
        while (line := await self._next_line()) is not None:
            answer, verdict, tries = await self._ask(lease, line)
            line.attempt.accept(line, answer, verdict is Verdict.SUCCESS, tries)
            if line.attempt.is_answered or line.attempt.uncommitted >= self._policy.commit_records:
                self._commit_now.set()

    async def _ask(self, lease: EngineLease, line: PendingLine) -> tuple[EngineAnswer, Verdict, int]:
        """Send a line until it has a final answer. Raises EngineFailure when the engine cannot be brought back."""
        request = EngineRequest(line.endpoint, line.body, line.request_id, line.attempt.index)
        faults = tries = 0
        while True:
            tries += 1
            try:
                answer = await lease.send(request)
            except EngineUnavailable:
                await lease.recover()
                continue
            verdict = judge(answer)
            faults += verdict is Verdict.FAULT
            if verdict in (Verdict.SUCCESS, Verdict.REJECTED) or self._policy.retry.is_spent(faults):
                return answer, verdict, tries
            await asyncio.sleep(self._policy.retry.delay(faults or tries))
            if verdict is Verdict.ENGINE_DOWN:
                await lease.recover()

    async def _commit_forever(self) -> None:
        """Make answers durable at most `commit_seconds` late, and publish chunks whose last answer is durable."""
        while True:
            try:
                async with asyncio.timeout(self._policy.commit_seconds):
                    await self._commit_now.wait()
            except TimeoutError:
                pass
            self._commit_now.clear()
            for attempt in list(self._begun.values()):
                if attempt.index not in self._published:
                    await self._commit(attempt)

    async def _commit(self, attempt: ChunkAttempt) -> None:
        await _finish_on_thread(attempt.commit, attempt.take_commit())
        if attempt.is_durable:
            summary = await _finish_on_thread(attempt.publish)
            self._mark_done(ChunkDone(attempt.index, attempt.epoch, summary))

    def _mark_done(self, done: ChunkDone) -> None:
        self._published.add(done.index)
        self._on_done(done)
        if len(self._published) == len(self._chunks):
            self._all_published.set()

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
            raise _Stopped
        for attempt in list(self._begun.values()):
            if attempt.index not in self._published:
                await asyncio.to_thread(attempt.mirror_progress)

    def _unpublished(self) -> list[Chunk]:
        return [chunk for chunk in self._chunks if chunk.index not in self._published]

    def _settle_engine_failure(self, error: EngineFailure) -> None:
        """Count the failure against the chunks that were at work, or against all when the engine never came; publish
        those whose attempts are used up as they are."""
        unpublished = self._unpublished()
        at_work = [chunk for chunk in unpublished if chunk.index in self._begun] or unpublished
        left = len(unpublished) - len(at_work)
        for chunk in at_work:
            attempt = self._begun.get(chunk.index) or self._begin(chunk)
            attempt.close()
            done = give_up_chunk(attempt, self._policy.chunk_attempts)
            left += done is None
            if done is not None:
                self._mark_done(ChunkDone(chunk.index, attempt.epoch, done))
        if left:
            raise error

    def _settle_stop(self) -> StopReason | None:
        """Keep what is journalled; the merge seals the chunks of a stopping batch."""
        self._close_attempts()
        for index, attempt in self._begun.items():
            if index not in self._published:
                attempt.give_back("stopped")
        return stop_reason(self._ports.store.batches.get(self._batch.id), self._ports.clock())

    def _close_attempts(self) -> None:
        """Close all of them, also when the disk refuses the last answers of one; then raise that."""
        with ExitStack() as stack:
            for attempt in self._begun.values():
                stack.callback(attempt.close)


async def _finish_on_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` on a thread. When cancelled, still wait for its end: nobody may close a journal under it."""
    task = asyncio.create_task(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    finally:
        await asyncio.wait([task])


@asynccontextmanager
async def _first_error(group: asyncio.TaskGroup) -> AsyncIterator[asyncio.TaskGroup]:
    """Enter `group`, and raise the first error itself instead of an ExceptionGroup around it."""
    try:
        async with group:
            yield group
    except BaseExceptionGroup as errors:
        raise _leaf(errors) from None


def _leaf(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that matters: any other before a stop, a stop before nothing."""
    leaves = [_leaf(error) if isinstance(error, BaseExceptionGroup) else error for error in errors.exceptions]
    return min(leaves, key=lambda error: isinstance(error, _Stopped))
