"""Stands between the workers of a run and the engine: who may fly beside whom while a killer is looked for.

Called by inference around each send. What a death means is decided by core/poison.py; here lines wait for their turn,
and what is known of them is on disk (`suspects.json` of the batch) before the engine is brought back and before a probe
flies, so that it outlives the run, and the machine. One run of a batch at a time writes it; were there two, the last
word would count, and only suspicion would be lost.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable, StorageFailure
from vllm_batch_dagster.core.journal import NO_RESPONSE
from vllm_batch_dagster.core.poison import ENGINE_CRASHED, MOST_BARREN, SuspectRecord, Suspicion, describe_conviction
from vllm_batch_dagster.core.ports import EngineAnswer, EngineLease, EngineRequest, Report
from vllm_batch_dagster.core.retry import Verdict, judge
from vllm_batch_dagster.stages.attempts import PendingLine
from vllm_batch_dagster.stages.publication import publish
from vllm_batch_dagster.stages.tasks import finish_on_thread

_ABRUPT_ENDS = 2
"""Runs in a row that were killed: then the lines that the next one sends first may have taken the machine down."""

Isolate = Callable[[PendingLine, str, int], None]


class Quarantine:
    """One run's. `isolate` is called with (line, message, sends) for each line that kills the engine, once.

    Make it on a thread: it reads and writes the record at `path`. Raises StorageFailure.
    """

    def __init__(self, path: Path, isolate: Isolate, report: Report) -> None:
        self._path, self._isolate, self._report = path, isolate, report
        left = _read(path)
        self._suspicion = Suspicion(left)
        self._abrupt_ends = left.abrupt_ends + 1 if left.is_running else 0
        self._to_accuse = self._window = 0
        self._answers = self._pulling = self._reviving = 0
        self._has_died = False
        self._flying: set[int] = set()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._probe_left: set[int] = set()
        self._fallen: set[int] = set()
        self._aside: dict[int, PendingLine] = {}
        self._isolated: set[int] = set()
        self._seen = ""
        self._saving = asyncio.Lock()
        self._is_saved = False
        self._write(is_running=True)

    def begin(self, window: int) -> None:
        """The lease is there, with so many lines in flight."""
        self._window = window
        if self._abrupt_ends >= _ABRUPT_ENDS:
            self._report(f"{self._abrupt_ends} runs were killed: the first {window} lines are sent by halves")
            self._to_accuse = window

    @contextmanager
    def pulling(self) -> Iterator[None]:
        """A worker fetches its next line: no probe begins before it is here."""
        self._pulling += 1
        try:
            yield
        finally:
            self._pulling -= 1
            if self._waiting:
                self._move()

    async def admits(self, line: PendingLine) -> bool:
        """Return True when the line may be sent now, False when it is not to be sent again: it is, or will be,
        isolated."""
        number = line.line
        if self._to_accuse > 0:
            self._to_accuse -= 1
            self._suspicion.accuse(number)
        if self._suspicion.is_convicted(number):
            self._set_aside(line)
            return False
        if self._waiting or self._reviving or self._probe_left or self._suspicion.is_suspect(number):
            self._waiting[number] = asyncio.get_running_loop().create_future()
            turn = self._waiting[number]
            self._move()
            await turn
        else:
            self._flying.add(number)
        return True

    async def send(
        self, lease: EngineLease, request: EngineRequest, line: PendingLine
    ) -> tuple[EngineAnswer, Verdict] | None:
        """Send an admitted line. Returns None when the engine died under it and is back: ask `admits` again.

        Raises EngineFailure when the engine cannot be brought back, or dies whatever it is given.
        """
        try:
            answer = await lease.send(request)
        except EngineUnavailable as error:
            await self._fall(lease, line.line, was_sent=error.was_sent)
            return None
        verdict = judge(answer)
        self._land(line.line, is_answered=verdict is not Verdict.BUSY)
        return answer, verdict

    def conclude(self) -> None:
        """No line is left: those that are set aside have nobody left to clear them."""
        for number in list(self._aside):
            self._settle(number)

    def close(self) -> None:
        """The run ends in an orderly way, and its journals are closed. A disk that refuses is not told of: then the run
        looks like a killed one, and that is no reason to fail it."""
        for number in self._isolated:
            self._suspicion.forget(number)
        with suppress(StorageFailure, OSError):
            if self._suspicion.is_calm or self._suspicion.is_hopeless:
                self._path.unlink(missing_ok=True)
            else:
                self._abrupt_ends = 0
                self._write(is_running=False)

    async def _fall(self, lease: EngineLease, number: int, *, was_sent: bool) -> None:
        """The engine is gone. Note it, and wait until it is back. Nothing flies before all that fell are here again:
        what is sent first would die alone, and look like the killer."""
        self._reviving += 1
        try:
            if was_sent and number in self._probe_left:
                self._fallen.add(number)
            elif was_sent:
                self._suspicion.note_failure(number)
                self._has_died, self._is_saved = True, False
            self._leave(number)
            self._refuse_hopeless()
            await self._revive(lease)
        finally:
            self._reviving -= 1
        if self._has_died and not self._reviving:
            self._suspicion.note_death()
            self._has_died = False
        self._refuse_hopeless()
        if self._waiting:
            self._move()

    def _refuse_hopeless(self) -> None:
        if self._suspicion.is_hopeless:
            raise EngineFailure(
                f"the engine died {MOST_BARREN} times in a row whatever it was given: it is not a line's fault. "
                f"{self._seen}".rstrip()
            )

    async def _revive(self, lease: EngineLease) -> None:
        """Return when the engine is back and what is known is durable: no line flies again before both."""
        saving = asyncio.create_task(self._save())
        try:
            self._seen = await lease.recover(None if self._suspicion.is_calm else 2 * MOST_BARREN)
        finally:
            await asyncio.wait([saving])
        saving.result()

    def _land(self, number: int, *, is_answered: bool) -> None:
        if is_answered:
            self._suspicion.note_answer(number)
            self._note_progress()
        self._leave(number)
        if self._waiting:
            self._move()

    def _note_progress(self) -> None:
        self._answers += 1
        if self._abrupt_ends and self._answers == self._window:
            self._abrupt_ends = 0
            self._write(is_running=True)
        for number in list(self._aside):
            if self._suspicion.is_proven(number):
                self._settle(number)

    def _leave(self, number: int) -> None:
        """A line is not in flight any more; with its last line a probe ends."""
        self._flying.discard(number)
        if number in self._probe_left:
            self._probe_left.discard(number)
            if not self._probe_left:
                self._suspicion.close_probe(self._fallen)
                self._fallen = set()
                self._is_saved = False

    def _move(self) -> None:
        """Let lines go: all when no suspect is at hand, else the next probe, when nothing else is on its way."""
        if self._probe_left or self._reviving:
            return
        suspects = {number for number in self._waiting if self._suspicion.is_suspect(number)}
        if not suspects:
            self._release(set(self._waiting))
        elif not self._flying and not self._pulling:
            self._begin_probe(suspects)

    def _begin_probe(self, suspects: set[int]) -> None:
        probe = self._suspicion.next_probe(suspects)
        self._report(f"the engine died twice under {len(suspects)} lines: sending {len(probe)} of them by themselves")
        self._write(is_running=True)
        self._probe_left = set(probe)
        self._release(set(probe))

    def _release(self, numbers: set[int]) -> None:
        for number in numbers:
            self._flying.add(number)
            turn = self._waiting.pop(number)
            if not turn.done():
                turn.set_result(None)

    def _set_aside(self, line: PendingLine) -> None:
        self._aside[line.line] = line
        if self._suspicion.is_proven(line.line):
            self._settle(line.line)

    def _settle(self, number: int) -> None:
        line, (deaths, alone) = self._aside.pop(number), self._suspicion.deaths(number)
        self._report(f"{line.custom_id} kills the engine: it goes to the error file")
        # Not forgotten yet: the error is not on disk, and should we die now, nobody need look for it again.
        self._isolated.add(number)
        self._isolate(line, describe_conviction(deaths, alone, self._seen), deaths)

    async def _save(self) -> None:
        """Make what is known durable, once for all lines of a death."""
        async with self._saving:
            if not self._is_saved:
                self._is_saved = True
                await finish_on_thread(self._store, self._record(is_running=True))

    def _write(self, *, is_running: bool) -> None:
        """The same at once; nothing that matters is in flight then."""
        self._is_saved = True
        self._store(self._record(is_running=is_running))

    def _record(self, *, is_running: bool) -> bytes:
        record = self._suspicion.to_record(is_running=is_running, abrupt_ends=self._abrupt_ends)
        return msgspec.json.encode(record)

    def _store(self, record: bytes) -> None:
        with publish(self._path) as file:
            file.write(record)


def isolate_line(line: PendingLine, message: str, tries: int) -> None:
    """Give a line that kills the engine its place in the error file. One that had an answer, and killed it when it was
    asked again, keeps that."""
    if line.attempt.tried(line.line) is not None:
        line.attempt.accept_tried(line.line)
        return
    said = msgspec.json.encode({"code": ENGINE_CRASHED, "message": message})
    line.attempt.accept(line, EngineAnswer(NO_RESPONSE, said, line.request_id, 0.0), False, tries)


def _read(path: Path) -> SuspectRecord:
    """Return what the last run left; nothing when that cannot be read: suspicion is never worth a batch."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SuspectRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return SuspectRecord()
