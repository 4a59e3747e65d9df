"""Asks flawed answers of a line again, as the batch's metadata wants it, until one is accepted. Called by the workers.

Every answer goes to the journal. Those that are asked again carry the reason, and a later attempt goes on behind them;
the one that is accepted stands there last. What is a flaw, and what is asked instead: core/repair.py.
"""

from collections.abc import Awaitable, Callable, Sequence

from vllm_batch_dagster.core.answers import read_answer
from vllm_batch_dagster.core.journal import FAILED_REPAIR, REPAIRED, UNREPAIRED
from vllm_batch_dagster.core.models import Batch, Chunk, RepairCounts
from vllm_batch_dagster.core.ports import EngineAnswer, EngineLease
from vllm_batch_dagster.core.repair import (
    Flaw,
    RepairPlan,
    enlarge,
    is_cut,
    read_plan,
    reseed,
    said_texts,
    wanted_format,
)
from vllm_batch_dagster.core.retry import Verdict
from vllm_batch_dagster.stages.attempts import PendingLine
from vllm_batch_dagster.stages.schemas import SchemaChecker

Asked = tuple[EngineAnswer, Verdict, int]
Ask = Callable[[bytes], Awaitable[Asked | None]]


def add_repairs(batch: Batch, chunks: Sequence[Chunk]) -> RepairCounts | None:
    """Return what the rounds did in all chunks, None for a batch that asks for none."""
    if not read_plan(batch.metadata).is_on:
        return None
    return sum((chunk.summary.repairs for chunk in chunks if chunk.summary is not None), RepairCounts())


class Repairer:
    """One run's. A plan that is off costs nothing."""

    def __init__(self, plan: RepairPlan) -> None:
        self._plan = plan
        self._schemas = SchemaChecker()
        self._longest: int | None = None
        self._knows_longest = False

    async def settle(self, line: PendingLine, lease: EngineLease, ask: Ask) -> bool:
        """Ask until the line has an answer that is accepted. Returns False when it kills the engine instead."""
        if not self._plan.is_on:
            if (asked := await ask(line.body)) is None:
                return False
            answer, verdict, tries = asked
            line.attempt.accept(line, answer, verdict is Verdict.SUCCESS, tries)
            return True
        if self._plan.heeds_length and not self._knows_longest:
            self._longest, self._knows_longest = await lease.context_length(), True
        return await _Turn(self._plan, self._schemas, self._longest, line).run(ask)


class _Turn:
    """One line on its way through the rounds. Begins behind what an earlier attempt has tried."""

    def __init__(self, plan: RepairPlan, schemas: SchemaChecker, longest: int | None, line: PendingLine) -> None:
        self._plan, self._schemas, self._longest, self._line = plan, schemas, longest, line
        self._format = wanted_format(line.endpoint, line.body) if plan.rounds else None
        self._round = self._reseeds = 0
        self._has_grown = False
        self._grown, self._body = line.body, line.body
        self._reason = ""
        self._resume()

    def _resume(self) -> None:
        tried = self._line.attempt.tried(self._line.line)
        if tried is None:
            return
        if tried.lengths:
            self._grow(bytes(tried.record.body))
        for _ in range(tried.schemas):
            self._reseed()
        self._round = tried.record.round + 1

    async def run(self, ask: Ask) -> bool:
        attempt, line = self._line.attempt, self._line
        while (asked := await ask(self._body)) is not None:
            answer, verdict, tries = asked
            if verdict is not Verdict.SUCCESS:
                self._settle_failure(asked)
                return True
            if (flaw := self._find_flaw(answer.body)) is None:
                attempt.accept(line, answer, True, tries, round_=self._round, repair=REPAIRED if self._round else "")
                return True
            if not self._prepare(flaw, answer.body):
                attempt.accept(line, answer, True, tries, round_=self._round, repair=UNREPAIRED)
                return True
            attempt.accept(line, answer, True, tries, round_=self._round, repair=self._reason)
            self._round += 1
        return False

    def _settle_failure(self, asked: Asked) -> None:
        """A repair that fails leaves the line with the success that it has."""
        answer, _verdict, tries = asked
        if self._line.attempt.tried(self._line.line) is None:
            self._line.attempt.accept(self._line, answer, False, tries)
            return
        self._line.attempt.accept(self._line, answer, False, tries, round_=self._round, repair=FAILED_REPAIR)
        self._line.attempt.accept_tried(self._line.line)

    def _find_flaw(self, answer: bytes) -> Flaw | None:
        if self._plan.heeds_length and is_cut(answer):
            return Flaw.LENGTH
        wanted = self._format
        if wanted is not None and not all(self._schemas.fits(text, wanted) for text in said_texts(answer)):
            return Flaw.SCHEMA
        return None

    def _prepare(self, flaw: Flaw, answer: bytes) -> bool:
        """Make the next request. Returns False when there is none that could do better."""
        self._reason = flaw.value
        if flaw is Flaw.LENGTH and self._grow(answer):
            return True
        # Cut JSON is broken JSON: another seed may be shorter.
        wanted = self._format
        is_broken = wanted is not None and not all(self._schemas.fits(text, wanted) for text in said_texts(answer))
        self._reason = Flaw.SCHEMA.value
        return is_broken and self._reseeds < self._plan.rounds and self._reseed()

    def _grow(self, answer: bytes) -> bool:
        if self._has_grown:
            return False
        prompt = read_answer(answer).usage.input_tokens
        larger = enlarge(self._line.endpoint, self._line.body, self._plan, prompt, self._longest)
        if larger is None:
            return False
        self._grown = self._body = larger
        self._has_grown = True
        return True

    def _reseed(self) -> bool:
        other = reseed(self._grown, self._reseeds + 1)
        if other is None:
            return False
        self._reseeds += 1
        self._body = other
        return True
