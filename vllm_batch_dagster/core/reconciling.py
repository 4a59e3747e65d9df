"""Decides what the graph must run next for a batch: level-triggered, from states alone. Called by the sensors.

Nothing here remembers anything: the same states always give the same launches, and a launch's key makes Dagster
drop a repeat (dagster report section 3).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_batch_dagster.core.merging import ENGINE_FAILURE
from vllm_batch_dagster.core.models import Batch, Chunk, stop_reason
from vllm_batch_dagster.core.states import BatchStatus


class Step(StrEnum):
    """A job of the graph."""

    VALIDATE = "validate"
    INFER = "infer"
    FINALIZE = "finalize"
    DELIVER = "deliver"


@dataclass(frozen=True, slots=True)
class Launch:
    """A run to ask for. `chunks` is (first, last), both included, of an INFER step."""

    step: Step
    batch_id: str
    key: str
    chunks: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class GraphState:
    """What Dagster knows of a batch.

    `materialized` maps a chunk's index to the storage id of its newest materialization. `active` says that a run
    of the batch is queued, running or about to be retried, `waiting` that all of those are still in the queue.
    `newest_run` is the storage id of the newest run that has ended, `failures` counts those that failed since the
    last success, `last_ended` (unix seconds) is when the newest ended.
    """

    materialized: Mapping[int, int]
    active: bool = False
    waiting: bool = False
    newest_run: int = 0
    failures: int = 0
    last_ended: float = 0.0


FREE_FAILURES = 3
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 10.0, 600.0


def pause_after(failures: int) -> float:
    """Return how long (seconds) to wait before asking again for a step that failed this often in a row.

    Dagster itself retries twice at once; what still fails after that (a full disk, say) is asked for ever less often.
    """
    if failures < FREE_FAILURES:
        return 0.0
    return float(min(_LONGEST_PAUSE_SECONDS, _PAUSE_SECONDS * 2 ** min(failures - FREE_FAILURES, 16)))


def decide_launches(
    batch: Batch,
    chunks: Sequence[Chunk],
    graph: GraphState,
    now: float,
    is_paused: Callable[[Chunk], bool] = lambda _chunk: False,
) -> Iterator[Launch]:
    """Yield what must run now. While a run of the batch is active there is nothing to ask for.

    A batch that must stop waits for nobody who has not begun: the run for its chunks may stand in the queue behind
    another batch for hours. Chunks that are paused are not asked for; whatever needs no engine goes on.
    """
    stopping = stop_reason(batch, now)
    if graph.active and not (stopping and graph.waiting):
        return
    if not stopping and now < graph.last_ended + pause_after(graph.failures):
        return
    if batch.is_terminal and not batch.is_stale:
        return
    key = f"{batch.id}:{graph.newest_run}"
    missing = [chunk.index for chunk in chunks if chunk.index not in graph.materialized or not chunk.is_published]
    if stopping:
        yield Launch(Step.FINALIZE, batch.id, f"stop:{key}:{stopping.value}")
    elif batch.status is BatchStatus.VALIDATING:
        yield Launch(Step.VALIDATE, batch.id, f"validate:{key}")
    elif missing and not batch.is_terminal:
        paused = {chunk.index for chunk in chunks if is_paused(chunk)}
        for first, last in contiguous_ranges([index for index in missing if index not in paused]):
            yield Launch(Step.INFER, batch.id, f"infer:{key}:{first}-{last}", (first, last))
    else:
        newest = max(graph.materialized.values(), default=0)
        yield Launch(Step.FINALIZE, batch.id, f"merge:{key}@{newest}")


def decide_delivery(batch_id: str, graph: GraphState, now: float) -> Launch | None:
    """Return the run for an ended batch of which the store says that something is to be delivered. What it delivers is
    claimed there, so a run of the batch's chunks beside it does no harm, and need not be waited for."""
    if now < graph.last_ended + pause_after(graph.failures):
        return None
    return Launch(Step.DELIVER, batch_id, f"deliver:{batch_id}:{graph.newest_run}")


def contiguous_ranges(indexes: Sequence[int]) -> list[tuple[int, int]]:
    """Group sorted `indexes` into ranges (first, last) without gaps: what one run can cover."""
    ranges: list[tuple[int, int]] = []
    for index in indexes:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], index)
        else:
            ranges.append((index, index))
    return ranges


class AttemptPlan(StrEnum):
    """What a chunk run does with one chunk."""

    RESUME = "resume"
    """No result yet, lines that the engine failed to answer, or an unfinished attempt: send what no journal answers."""
    REPEAT = "repeat"
    """The result is already shown by Dagster: a person asks for new answers."""
    REPORT = "report"
    """The result is published but Dagster never heard of it: only report it."""
    SKIP = "skip"
    """Already done and shown for this very request."""


@dataclass(frozen=True, slots=True)
class ShownResult:
    """The newest materialization of a chunk: the attempt it shows, and whether it is younger than the request for
    this run, or was made by an earlier run that this one retries."""

    epoch: int
    answers_this_request: bool


def plan_attempt(chunk: Chunk, shown: ShownResult | None) -> AttemptPlan:
    """Choose what a run does with `chunk`, given what Dagster shows of it (None: never materialized).

    A result that is younger than the request answers it: so a retry never repeats what its forerunner finished, and
    two requests for the same chunk cost one inference.
    """
    if not chunk.is_published or chunk.is_unfinished:
        return AttemptPlan.RESUME
    if shown is None or shown.epoch != chunk.published_epoch:
        return AttemptPlan.REPORT
    if shown.answers_this_request:
        return AttemptPlan.SKIP
    was_given_up = chunk.summary is not None and ENGINE_FAILURE in chunk.summary.error_codes
    return AttemptPlan.RESUME if was_given_up else AttemptPlan.REPEAT
