"""The values that travel along the data path: file, batch, chunk, attempt, and the counts that hang on them.

Everything here is frozen; a change is a new value made with `dataclasses.replace`. Times are unix seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from vllm_batch_dagster.core.states import TERMINAL, BatchStatus

T = TypeVar("T")

# OpenAI's create-time purposes (contract A.1) and the one that batches write (A.2).
UPLOAD_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
OUTPUT_PURPOSE = "batch_output"

# Endpoints whose lines the engine answers: OpenAI's (contract C.1) and vLLM's score and rerank.
ENDPOINTS = (
    "/v1/responses",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/completions",
    "/v1/score",
    "/v1/rerank",
)

DAY_SECONDS = 86_400
DEFAULT_PROJECT = "default"  # owns what is made without a key: on loopback, by the drop folder
DEFAULT_FILE_LIFETIME_SECONDS = 30 * DAY_SECONDS  # purpose=batch and batch output (contract A.1, D.3)


@dataclass(frozen=True, slots=True)
class File:
    """A stored file. `bytes` is its length; `sha256` the hex digest of its content; `expires_at` None = never."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    sha256: str
    expires_at: int | None = None
    project_id: str = DEFAULT_PROJECT


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """Lines of a batch: `total` known after validation, `completed` with a 2xx answer, `failed` without."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    def __add__(self, other: "RequestCounts") -> "RequestCounts":
        return RequestCounts(self.total + other.total, self.completed + other.completed, self.failed + other.failed)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the engine counted them, in OpenAI's batch words (contract C.2)."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True)
class RepairCounts:
    """What repair rounds did: lines that got a good answer by them, lines whose accepted answer is still flawed,
    answers that were asked again, and the tokens of the repeats (part of the usage)."""

    repaired: int = 0
    unrepaired: int = 0
    repeats: int = 0
    repeat_tokens: int = 0

    def __add__(self, other: "RepairCounts") -> "RepairCounts":
        return RepairCounts(
            self.repaired + other.repaired,
            self.unrepaired + other.unrepaired,
            self.repeats + other.repeats,
            self.repeat_tokens + other.repeat_tokens,
        )


@dataclass(frozen=True, slots=True)
class LineError:
    """One entry of a failed batch's `errors.data` (contract D.4). `line` is 1-based; None = the whole file."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch. `result_version` counts published chunk results, `merged_version` the one last merged:
    when they differ, the output file is older than the chunks (a chunk was run again). `model` is None until validation
    is done, and for a file with several. `rejected` lines did not pass lenient validation: they are in no chunk."""

    id: str
    input_file_id: str
    endpoint: str
    completion_window: str
    status: BatchStatus
    created_at: int
    expires_at: int
    metadata: Mapping[str, str] | None = None
    output_expires_after: int | None = None
    model: str | None = None
    errors: tuple[LineError, ...] = ()
    counts: RequestCounts = field(default_factory=RequestCounts)
    usage: Usage | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    result_version: int = 0
    merged_version: int = 0
    rejected: int = 0
    repairs: RepairCounts | None = None  # of a merged batch that asks for repair rounds
    project_id: str = DEFAULT_PROJECT
    purged_at: int | None = None  # when its chunks, journals and Dagster runs went

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def is_stale(self) -> bool:
        """True when chunks were published after the last merge."""
        return self.result_version != self.merged_version


class StopReason(StrEnum):
    """Why a batch that has not finished must stop. The value is the error code of its unanswered lines."""

    CANCELLED = "batch_cancelled"
    EXPIRED = "batch_expired"


def stop_reason(batch: Batch, now: float) -> StopReason | None:
    """Return why `batch` must stop at `now` (unix seconds), or None while it may go on."""
    if batch.status is BatchStatus.CANCELLING:
        return StopReason.CANCELLED
    if not batch.is_terminal and now >= batch.expires_at:
        return StopReason.EXPIRED
    return None


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """Lines `first_line` .. `first_line + line_count` (0-based) of the byte index, all for `model`. `offset` and
    `length` span them in the input file; the lines of other models and rejected ones may lie between."""

    index: int
    first_line: int
    line_count: int
    offset: int
    length: int
    model: str | None = None


@dataclass(frozen=True, slots=True)
class ChunkSummary:
    """What a published chunk holds, for the UI and the counts. Times in unix seconds, lengths in tokens.

    `first_sent_at` and `last_answer_at` are of the attempt that was published (0.0 when it sent nothing): the span
    in which the engine worked for it. `sent` are its own lines and `sent_tokens` what they took, `replayed` the lines
    that earlier attempts had answered.
    """

    counts: RequestCounts
    usage: Usage
    first_sent_at: float = 0.0
    last_answer_at: float = 0.0
    replayed: int = 0
    sent: int = 0
    sent_tokens: int = 0
    latency_p50: float = 0.0
    latency_p95: float = 0.0
    finish_reasons: Mapping[str, int] = field(default_factory=dict)
    error_codes: Mapping[str, int] = field(default_factory=dict)
    input_lengths: tuple[tuple[int, int], ...] = ()
    output_lengths: tuple[tuple[int, int], ...] = ()
    digest: str = ""
    repairs: RepairCounts = field(default_factory=RepairCounts)

    @property
    def inference_seconds(self) -> float:
        return max(0.0, self.last_answer_at - self.first_sent_at)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk and the state of its attempts.

    `epoch` is the newest attempt (0 = none yet); journals of epochs `base_epoch`..`epoch` count for it.
    `published_epoch` is the attempt whose result a merge reads (0 = none). An attempt is unfinished while
    `epoch > published_epoch`. `engine_failures` counts attempts since `base_epoch` that ended because the
    engine could not answer.
    """

    batch_id: str
    range: ChunkRange
    epoch: int = 0
    base_epoch: int = 0
    published_epoch: int = 0
    engine_failures: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)
    summary: ChunkSummary | None = None

    @property
    def index(self) -> int:
        return self.range.index

    @property
    def is_published(self) -> bool:
        return self.published_epoch > 0

    @property
    def is_unfinished(self) -> bool:
        """True when an attempt began and was not published: a rerun resumes it."""
        return self.epoch > self.published_epoch


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of a chunk. Only the newest epoch may publish (the fence of design section 5)."""

    batch_id: str
    index: int
    epoch: int
    base_epoch: int
    engine_failures: int


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a listing, in the order asked for."""

    data: tuple[T, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Model:
    """A model that this server can run. `path` is a local folder or a Hugging Face id."""

    name: str
    path: str
    task: str = "generate"
    aliases: tuple[str, ...] = ()
    args: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)
