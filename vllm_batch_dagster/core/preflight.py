"""What a pre-flight says about an input file before any engine runs, and the estimate of its run time. Pure.

In: what was measured of the file (stages/preflight.py) and the finished chunks of the same model. Out: values that the
API, the UI and the command line show.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_batch_dagster.core.histogram import Buckets
from vllm_batch_dagster.core.merging import covered_seconds
from vllm_batch_dagster.core.models import Chunk, Model
from vllm_batch_dagster.core.prompts import TokenCounter

PROMPT_TOO_LONG = "context_length_exceeded"
OUTPUT_TOO_LONG = "max_tokens_too_large"

# The interval holds four of five past chunks; of fewer than this many chunks it is their whole range, widened.
_FEW = 5
_WIDENING = 1.5
_LOW, _MIDDLE, _HIGH = 0.1, 0.5, 0.9


@dataclass(frozen=True, slots=True)
class ContextLength:
    """The most tokens that a model takes in one request, and in words where that is known from."""

    tokens: int
    source: str


class ModelFacts(Protocol):
    """Port: what can be known of a model without running it."""

    def counter(self, model: Model) -> TokenCounter:
        """An estimating one when the model's tokenizer is not at hand."""

    def context(self, model: Model) -> ContextLength | None:
        """The longest request that it takes; None when nothing says so."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A finished chunk as the estimate sees it: how fast the engine worked, and how much it wrote per line."""

    tokens: int
    seconds: float
    output_per_line: float
    latency: float


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be done: `output_cap` is the mean limit of output tokens per line, None when lines set none."""

    lines: int
    input_tokens: int
    output_cap: float | None = None


@dataclass(frozen=True, slots=True)
class RunTime:
    """Seconds of inference: the middle, and the interval `low`..`high`. `chunks`: how many it was learned from."""

    seconds: float
    low: float
    high: float
    chunks: int

    def __add__(self, other: "RunTime") -> "RunTime":
        """Models run one after the other."""
        return RunTime(
            self.seconds + other.seconds, self.low + other.low, self.high + other.high, self.chunks + other.chunks
        )


@dataclass(frozen=True, slots=True)
class MisfitLine:
    """A line that the engine would refuse. `tokens` are those of its longest prompt, or its limit of output tokens."""

    line: int
    custom_id: str
    code: str
    tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """The part of the file that is for one model. `lines` and `input_tokens` are scaled up when only a sample was
    counted; `is_exact` says that the model's own tokenizer counted, and `method` how."""

    model: str
    lines: int
    input_tokens: int
    is_exact: bool
    method: str
    context: ContextLength | None
    run_time: RunTime | None


@dataclass(frozen=True, slots=True)
class Measurement:
    """`lines` are all requests of the file, `counted` those whose tokens were counted for `lengths`, and `examined`
    those held against the context (the counted ones and the longest). `shortened` of these leave less room for the
    answer than they ask for. `repeats` are lines whose body stood earlier in the file; None: not looked for."""

    lines: int
    counted: int
    examined: int
    lengths: Buckets
    longest: int
    loads: tuple[ModelLoad, ...]
    misfits: tuple[MisfitLine, ...]
    misfit_count: int
    shortened: int
    has_media: bool = False
    repeats: int | None = None
    repeats_exact: bool = True

    @property
    def is_sampled(self) -> bool:
        return self.counted < self.lines

    @property
    def input_tokens(self) -> int:
        return sum(load.input_tokens for load in self.loads)

    @property
    def run_time(self) -> RunTime | None:
        """None when there is no history for one of the models."""
        total: RunTime | None = None
        for load in self.loads:
            if load.run_time is None:
                return None
            total = load.run_time if total is None else total + load.run_time
        return total


def observe_chunks(chunks: Iterable[Chunk]) -> Sequence[Observation]:
    """Return what finished chunks teach. Chunks of a batch overlap in time, so each gets its share of the time that
    they covered together: otherwise the engine would look slower than it was."""
    batches: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        if chunk.summary and chunk.summary.sent_tokens > 0 and chunk.summary.inference_seconds > 0:
            batches.setdefault(chunk.batch_id, []).append(chunk)
    return [observation for group in batches.values() for observation in _observe_batch(group)]


def _observe_batch(chunks: Sequence[Chunk]) -> Iterable[Observation]:
    summaries = [chunk.summary for chunk in chunks if chunk.summary]
    covered = covered_seconds((each.first_sent_at, each.last_answer_at) for each in summaries)
    share = covered / sum(each.inference_seconds for each in summaries)
    for each in summaries:
        per_line = each.usage.output_tokens / each.counts.completed if each.counts.completed else 0.0
        yield Observation(each.sent_tokens, each.inference_seconds * share, per_line, each.latency_p50)


def estimate_run_time(work: Workload, history: Sequence[Observation]) -> RunTime | None:
    """Return how long `work` would take at the speeds of `history`; None without history.

    Each past chunk gives one answer: its tokens per line to write, its tokens per second, and never less than one
    request took. Chunks count by their tokens, so that many small trials do not outvote a real batch.
    """
    if not history or not work.lines:
        return None
    answers = sorted((_seconds_at(work, seen), float(seen.tokens)) for seen in history)
    low, middle, high = (_weighted_quantile(answers, share) for share in (_LOW, _MIDDLE, _HIGH))
    if len(answers) < _FEW:
        low, high = answers[0][0] / _WIDENING, answers[-1][0] * _WIDENING
    return RunTime(middle, low, high, len(answers))


def _seconds_at(work: Workload, seen: Observation) -> float:
    per_line = seen.output_per_line
    if work.output_cap is not None:
        per_line = min(per_line, work.output_cap)
    tokens = work.input_tokens + work.lines * per_line
    return max(tokens * seen.seconds / seen.tokens, seen.latency)


def _weighted_quantile(pairs: Sequence[tuple[float, float]], share: float) -> float:
    """Return the value at `share` of the weight. `pairs` are (value, weight), smallest value first."""
    wanted = share * sum(weight for _value, weight in pairs)
    passed = 0.0
    for value, weight in pairs:
        passed += weight
        if passed >= wanted:
            return value
    return pairs[-1][0]


def describe_sample(measured: Measurement) -> str:
    """Return a sentence that says how many lines were looked at, and what was not."""
    if not measured.is_sampled:
        return f"All {measured.lines} lines were counted."
    return (
        f"A random sample of {measured.counted} of {measured.lines} lines was counted and scaled up; "
        f"{measured.examined - measured.counted} of the longest others were held against the context too."
    )


def describe_run_time(measured: Measurement) -> str:
    """Return sentences that say what the estimate rests on, or why there is none."""
    unknown = [load.model for load in measured.loads if load.run_time is None]
    time = measured.run_time
    if time is None:
        names = ", ".join(unknown) or "these lines"
        return f"There is no history of {names} on this server: the run time is not known until a chunk has finished."
    few = "only " if time.chunks < _FEW else ""
    return (
        f"Learned from {few}{time.chunks} finished chunk{'s' if time.chunks != 1 else ''} of this server. "
        "The start of the engine and the wait for other batches come on top."
    )
