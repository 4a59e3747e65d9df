"""Counts the tokens of chosen lines and holds them against the context of their model. Called by stages/preflight.py.

In: places of lines and the file. Out: one Measurement, scaled up from the sample to the whole file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from vllm_batch_dagster.core.histogram import Histogram
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore, ModelCatalog
from vllm_batch_dagster.core.preflight import (
    OUTPUT_TOO_LONG,
    PROMPT_TOO_LONG,
    ContextLength,
    Measurement,
    MisfitLine,
    ModelFacts,
    ModelLoad,
    Workload,
    estimate_run_time,
    observe_chunks,
)
from vllm_batch_dagster.core.prompts import PromptLength, Prompts, RoughLine, TokenCounter, read_line, read_prompts
from vllm_batch_dagster.core.sampling import LinePlace
from vllm_batch_dagster.stages.survey import Survey

_MOST_NAMES = 100  # a file may name a different model on every line


@dataclass(frozen=True, slots=True)
class PreflightPorts:
    """What a pre-flight needs from the outside world."""

    store: BatchStore
    files: FileStore
    catalog: ModelCatalog
    facts: ModelFacts
    clock: Clock


@dataclass(frozen=True, slots=True)
class PreflightBudget:
    """How much is looked at: lines of the sample, longest lines beside it, seconds of counting, chunks of history,
    lines listed as too long."""

    sample: int = 5000
    longest: int = 500
    seconds: float = 10.0
    history: int = 200
    listed: int = 1000


@dataclass(slots=True)
class _Tally:
    """What was found for one model. `limited` lines set a limit of output tokens; `limits` is their sum."""

    model: Model
    counter: TokenCounter
    context: ContextLength | None
    lines: int = 0
    tokens: int = 0
    limited: int = 0
    limits: int = 0

    def add(self, prompts: Prompts, length: PromptLength) -> None:
        self.lines += 1
        self.tokens += length.tokens
        if prompts.max_tokens is not None:
            self.limited += 1
            self.limits += prompts.max_tokens

    @property
    def output_cap(self) -> float | None:
        return self.limits / self.lines if self.lines and self.limited == self.lines else None


class Measuring:
    """One walk over the lines that a survey chose."""

    def __init__(self, ports: PreflightPorts, budget: PreflightBudget) -> None:
        self._ports, self._budget = ports, budget
        self._tallies: dict[str, _Tally | None] = {}  # by the name that a line gives; aliases share one
        self._misfits: list[MisfitLine] = []
        self._lengths = Histogram()
        self._longest = self._misfit_count = self._shortened = self._media = 0

    def run(self, survey: Survey, source: BinaryIO) -> Measurement:
        """Count until all is done or the time is over, one line at least."""
        deadline = self._ports.clock() + self._budget.seconds
        counted = self._walk(survey.sample, source, deadline, is_counted=True)
        seen = {place.number for place in survey.sample[:counted]}
        suspects = [place for place in survey.longest if place.number not in seen]
        examined = counted + self._walk(suspects, source, deadline, is_counted=False)
        return self._conclude(survey, counted, examined)

    def _walk(self, places: Sequence[LinePlace], source: BinaryIO, deadline: float, *, is_counted: bool) -> int:
        """Look at the lines in turn. Returns how many."""
        for done, place in enumerate(places):
            if done and self._ports.clock() >= deadline:
                return done
            source.seek(place.offset)
            line = read_line(source.read(place.length))
            prompts = read_prompts(line.body) if line else None
            if line and prompts and (tally := self._tally_of(line.model)):
                length = tally.counter.count(prompts)
                self._compare(place, line, prompts, length, tally)
                if is_counted:
                    tally.add(prompts, length)
                    self._lengths.add(length.tokens)
        return len(places)

    def _tally_of(self, name: str) -> _Tally | None:
        """None for a name that this server does not know: validation says so."""
        if name not in self._tallies:
            if len(self._tallies) >= _MOST_NAMES:
                return None
            self._tallies[name] = self._begin(name)
        return self._tallies[name]

    def _begin(self, name: str) -> _Tally | None:
        model = self._ports.catalog.find(name)
        if model is None:
            return None
        known = (tally for tally in self._tallies.values() if tally and tally.model.name == model.name)
        facts = self._ports.facts
        return next(known, None) or _Tally(model, facts.counter(model), facts.context(model))

    def _compare(
        self, place: LinePlace, line: RoughLine, prompts: Prompts, length: PromptLength, tally: _Tally
    ) -> None:
        self._longest = max(self._longest, length.longest)
        self._media += prompts.has_media
        if tally.context is None:
            return
        most, wanted = tally.context.tokens, prompts.max_tokens or 0
        if length.longest > most and not prompts.is_truncated:
            self._refuse(MisfitLine(place.number, line.custom_id, PROMPT_TOO_LONG, length.longest, most))
        elif wanted > most:
            self._refuse(MisfitLine(place.number, line.custom_id, OUTPUT_TOO_LONG, wanted, most))
        elif length.longest + wanted > most:
            self._shortened += 1

    def _refuse(self, misfit: MisfitLine) -> None:
        self._misfit_count += 1
        if len(self._misfits) < self._budget.listed:
            self._misfits.append(misfit)

    def _conclude(self, survey: Survey, counted: int, examined: int) -> Measurement:
        scale = survey.lines / counted if counted else 0.0
        return Measurement(
            lines=survey.lines,
            counted=counted,
            examined=examined,
            lengths=self._lengths.buckets(),
            longest=self._longest,
            loads=tuple(self._loads(scale)),
            misfits=tuple(sorted(self._misfits, key=lambda misfit: misfit.line)),
            misfit_count=self._misfit_count,
            shortened=self._shortened,
            has_media=self._media > 0,
            repeats=survey.repeats,
            repeats_exact=survey.repeats_exact,
        )

    def _loads(self, scale: float) -> Iterator[ModelLoad]:
        tallies = {tally.model.name: tally for tally in self._tallies.values() if tally and tally.lines}
        for name, tally in sorted(tallies.items()):
            lines, tokens = round(tally.lines * scale), round(tally.tokens * scale)
            history = observe_chunks(self._ports.store.chunks.finished(name, self._budget.history))
            yield ModelLoad(
                model=name,
                lines=lines,
                input_tokens=tokens,
                is_exact=tally.counter.is_exact,
                method=tally.counter.method,
                context=tally.context,
                run_time=estimate_run_time(Workload(lines, tokens, tally.output_cap), history),
            )
