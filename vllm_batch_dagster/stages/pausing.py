"""Pauses as the sensor and a run meet them: the board says which hold, the gate of a run keeps its lines back.

A run that meets a pause sends no new line. It waits a little for the pause to end, then gives its attempts back
(`paused`, no failure) and ends well, so that the engine and its slot are free; the sensor asks again afterwards.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from vllm_batch_dagster.core.errors import (
    ConfigurationError,
    CorruptJournal,
    EngineFailure,
    EngineStartFailed,
    EngineUnreachable,
    StorageFailure,
    UnprovenMerge,
)
from vllm_batch_dagster.core.models import Batch, Chunk, Model
from vllm_batch_dagster.core.pause_ports import PauseRecords, Watch
from vllm_batch_dagster.core.pauses import (
    ALL,
    Pause,
    PauseCause,
    configuration_mark,
    find_pause,
    model_of_scope,
    model_scope,
    trip,
)
from vllm_batch_dagster.core.ports import Clock, Report

# The engine could not be had at all, so the lines have done nothing to be counted against them.
_ABSENT = (EngineStartFailed, EngineUnreachable, ConfigurationError)
_DAMAGE = (CorruptJournal, UnprovenMerge)


class RunPaused(Exception):
    """The run ends because of a pause. Control flow inside the inference stage only."""


def model_of(batch: Batch, chunk: Chunk) -> str | None:
    """Return the model whose pauses hold for a chunk."""
    return chunk.range.model or batch.model


def models_of(batch: Batch, chunks: Sequence[Chunk]) -> Sequence[str]:
    """Return the models of a batch, as far as they are known."""
    names = (model_of(batch, chunk) for chunk in chunks)
    return [name for name in dict.fromkeys([*names, batch.model]) if name]


class PauseBoard:
    """All pauses: those in the store, and those that the machine's state asks for. What `passing` watches say is known
    wherever they are looked at; what `kept` ones say is stored, so that others know it and the next look too."""

    def __init__(
        self, records: PauseRecords, clock: Clock, *, passing: Sequence[Watch] = (), kept: Sequence[Watch] = ()
    ) -> None:
        self.records, self._clock = records, clock
        self._passing, self._kept = passing, kept
        self._seen: dict[PauseCause, Pause] = {}

    def standing(self) -> Sequence[Pause]:
        """Look at everything and return the pauses that hold now. Raises StorageFailure."""
        now = self._clock()
        stored = {(pause.scope, pause.cause): pause for pause in self.records.list()}
        for watch in self._kept:
            before = stored.pop((ALL, watch.cause), None)
            if (after := self._keep(watch, before, now)) is not None:
                stored[ALL, watch.cause] = after
        passing = [pause for watch in self._passing if (pause := self._look(watch, now)) is not None]
        return [pause for pause in (*stored.values(), *passing) if pause.holds(now)]

    def _keep(self, watch: Watch, before: Pause | None, now: float) -> Pause | None:
        after = watch.look(before, now)
        if after is None and before is not None:
            self.records.remove(ALL, watch.cause)
        elif after is not None and after != before:
            self.records.put(after)
        return after

    def _look(self, watch: Watch, now: float) -> Pause | None:
        pause = watch.look(self._seen.get(watch.cause), now)
        if pause is None:
            self._seen.pop(watch.cause, None)
        else:
            self._seen[watch.cause] = pause
        return pause

    def find(self, batch_id: str, model: str | None) -> Pause | None:
        """Return the pause that stops a batch now. Raises StorageFailure."""
        return find_pause(self.standing(), batch_id, model, self._clock())

    def lift_mended(self, mark_of: Callable[[str], str]) -> None:
        """End the engine's lasting pauses whose configuration has changed. `mark_of` gives that of a model now."""
        for pause in self.records.list():
            model = model_of_scope(pause.scope)
            if pause.cause is PauseCause.ENGINE and pause.mark and model and pause.mark != mark_of(model):
                self.records.remove(pause.scope, pause.cause)

    def trip(self, scope: str, cause: PauseCause, reason: str, *, lasting: bool = False, mark: str = "") -> Pause:
        """Open a breaker, for longer than last time. One that the store does not take holds for its caller alone."""
        before: Pause | None = None
        with suppress(StorageFailure):
            before = next((p for p in self.records.list() if (p.scope, p.cause) == (scope, cause)), None)
        pause = trip(before, scope, cause, reason, self._clock(), lasting=lasting, mark=mark)
        with suppress(StorageFailure):
            self.records.put(pause)
        return pause


def lift(records: PauseRecords, batch: Batch | None, models: Sequence[str] = ()) -> Sequence[Pause]:
    """End what an operator may end: for a `batch` its own pauses and those of its `models`; for None all that are not
    of one batch. Breakers try again at once. Returns what was ended."""

    def is_meant(pause: Pause) -> bool:
        if batch is None:
            return pause.scope == ALL or model_of_scope(pause.scope) is not None
        return pause.scope == batch.id or model_of_scope(pause.scope) in models

    return [pause for pause in records.list() if is_meant(pause) and records.remove(pause.scope, pause.cause)]


@dataclass(frozen=True, slots=True)
class PausePolicy:
    """How long (seconds) a run that is paused keeps the engine for the case that it goes on at once, and what stands
    for the engine's settings, see `configuration_mark`."""

    patience: float = 10.0
    engine: str = ""


class RunGate:
    """Keeps the lines of one run back while a pause holds. Lives on the run's event loop."""

    def __init__(
        self,
        board: PauseBoard,
        batch: Batch,
        chunks: Sequence[Chunk],
        model: Model,
        policy: PausePolicy,
        report: Report,
    ) -> None:
        self._board, self._batch, self._model, self._policy, self._report = board, batch, model, policy, report
        self._name = (model_of(batch, chunks[0]) if chunks else None) or model.name
        self._open = asyncio.Event()
        self._open.set()
        self._since = 0.0
        self.pause: Pause | None = None
        self.is_over = False
        self.has_answer = False

    async def enter(self) -> None:
        """Called before anything is begun. Raises RunPaused when a pause holds, StorageFailure."""
        self.pause = await asyncio.to_thread(self._board.find, self._batch.id, self._name)
        if self.pause is not None:
            raise RunPaused

    async def look(self) -> None:
        """Look whether a pause holds; when one has held for too long the run `is_over`. Raises StorageFailure."""
        await self.settle()
        pause = await asyncio.to_thread(self._board.find, self._batch.id, self._name)
        if pause is None:
            self._go_on()
        else:
            self._hold(pause)

    def _go_on(self) -> None:
        if self.pause is not None and not self.is_over:
            self._report("the pause is over: lines are sent again")
            self.pause = None
            self._open.set()

    def _hold(self, pause: Pause) -> None:
        if self.pause is None:
            self._since = time.monotonic()
            self._report(f"{pause.describe()}; no new line is sent")
        self.pause = pause
        self._open.clear()
        if time.monotonic() - self._since >= self._policy.patience:
            self.is_over = True
        if self.is_over:
            self._open.set()

    async def admits(self) -> bool:
        """Wait while a pause holds. False when the run is to end because of it."""
        if not self._open.is_set():
            await self._open.wait()
        return not self.is_over

    async def settle(self) -> None:
        """Forget the breakers when there is an answer: the engine works. Raises StorageFailure."""
        if self.has_answer:
            await asyncio.to_thread(self._forget_breakers)
            self.has_answer = False  # behind it: a look that is cut short at the end of the run has done nothing

    def _forget_breakers(self) -> None:
        ours = {(model_scope(self._name), PauseCause.ENGINE), (ALL, PauseCause.STORAGE)}
        for pause in self._board.records.list():
            if (pause.scope, pause.cause) in ours:
                self._board.records.remove(pause.scope, pause.cause)

    def trip_for(self, error: Exception, had_lease: bool) -> Pause | None:
        """Return the breaker's pause for an error that says nothing about the lines; None when it does."""
        if isinstance(error, StorageFailure):
            # Damage is no lack of space: to wait would not mend it.
            return None if isinstance(error, _DAMAGE) else self._board.trip(ALL, PauseCause.STORAGE, str(error))
        may_pass = isinstance(error, EngineFailure) and error.may_pass
        if isinstance(error, _ABSENT) or not may_pass or not had_lease:
            return self._trip_engine(error, lasting=not may_pass)
        return None

    def _trip_engine(self, error: Exception, *, lasting: bool) -> Pause:
        """Open the breaker of the model's engine. After an error that no repetition mends it has no end of its own."""
        mend = "When that is mended, `vllm-batch resume`" if lasting else "`vllm-batch resume` tries at once"
        reason = f"the engine of {self._name} cannot be had: {error}\n{mend}"
        mark = configuration_mark(self._model, self._policy.engine)
        return self._board.trip(model_scope(self._name), PauseCause.ENGINE, reason, lasting=lasting, mark=mark)
