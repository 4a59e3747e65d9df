"""What the in-memory store keeps: dicts in insertion order under one lock, and the pages over them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Protocol, TypeVar

from vllm_batch_dagster.adapters.store.rules import AttemptRecord
from vllm_batch_dagster.core.claims import Claim, ClaimKey
from vllm_batch_dagster.core.deliveries import DeliveryRecord
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.keys import Key
from vllm_batch_dagster.core.models import Batch, Chunk, File, Page
from vllm_batch_dagster.core.pauses import Pause, PauseCause
from vllm_batch_dagster.core.ports import OutboxEvent
from vllm_batch_dagster.core.uploads import Upload, UploadPart
from vllm_batch_dagster.core.webhooks import SigningSecret, WebhookEndpoint

ChunkKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class KeptClaim:
    """A claim's row: the object that it made, and when (unix seconds)."""

    claim: Claim
    object_id: str
    created_at: int


@dataclass(slots=True)
class Tables:
    """All rows of one store. Whoever reads or writes holds `lock`: that is its transaction."""

    lock: RLock = field(default_factory=RLock)
    files: dict[str, File] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    chunks: dict[ChunkKey, Chunk] = field(default_factory=dict)
    attempts: dict[ChunkKey, list[AttemptRecord]] = field(default_factory=dict)
    events: list[OutboxEvent] = field(default_factory=list)
    deliveries: dict[str, DeliveryRecord] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    parts: dict[str, UploadPart] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    claims: dict[ClaimKey, KeptClaim] = field(default_factory=dict)
    pauses: dict[tuple[str, PauseCause], Pause] = field(default_factory=dict)
    webhooks: dict[str, WebhookEndpoint] = field(default_factory=dict)
    webhook_secrets: dict[str, SigningSecret] = field(default_factory=dict)

    def chunks_of(self, batch_id: str) -> list[Chunk]:
        """In index order."""
        found = (chunk for (owner, _), chunk in self.chunks.items() if owner == batch_id)
        return sorted(found, key=lambda chunk: chunk.index)


class Listed(Protocol):
    """What can stand in a listing."""

    @property
    def id(self) -> str: ...
    @property
    def created_at(self) -> int: ...


class Owned(Protocol):
    """What belongs to a project."""

    @property
    def project_id(self) -> str: ...


T = TypeVar("T", bound=Listed)
OwnedT = TypeVar("OwnedT", bound=Owned)


def within(rows: Iterable[OwnedT], project_id: str | None) -> Iterable[OwnedT]:
    """Return the rows of one project; None: all projects."""
    return (row for row in rows if project_id in (None, row.project_id))


def by_time(rows: Iterable[T], *, descending: bool = False) -> list[T]:
    """Sort by (created_at, insertion), given the rows in insertion order."""
    ordered = sorted(rows, key=lambda row: row.created_at)  # stable, so ties stay in insertion order
    return ordered[::-1] if descending else ordered


def take_page(ordered: Sequence[T], shown: Sequence[T], *, kind: str, after: str | None, limit: int) -> Page[T]:
    """Return up to `limit` of `shown` behind the row `after`, which may be any row of `ordered`.

    Raises NotFound(`kind`, after) for an unknown one.
    """
    places = {row.id: place for place, row in enumerate(ordered)}
    if after is not None and after not in places:
        raise NotFound(kind, after)
    start = -1 if after is None else places[after]
    following = [row for row in shown if places[row.id] > start]
    return Page(tuple(following[:limit]), has_more=len(following) > limit)
