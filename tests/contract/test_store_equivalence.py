"""Any sequence of calls does the same to the SQL store and to its in-memory twin: results, errors and final state."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from vllm_batch_dagster.adapters.memory import MemoryStore
from vllm_batch_dagster.adapters.store import SqlStore, open_store
from vllm_batch_dagster.core.claims import Claim, ClaimKey
from vllm_batch_dagster.core.errors import BatchError
from vllm_batch_dagster.core.models import (
    DEFAULT_PROJECT,
    Attempt,
    Batch,
    ChunkRange,
    ChunkSummary,
    File,
    LineError,
    Page,
    RequestCounts,
    Usage,
)
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.core.uploads import Upload, UploadPart, UploadStatus

Store = MemoryStore | SqlStore

# Few ids and times, so that calls meet each other.
BATCH_IDS = ("batch_a", "batch_b")
batch_ids = st.sampled_from(BATCH_IDS)
file_ids = st.sampled_from(["file-1", "file-2", "file-3", "file-4"])
indexes = st.integers(0, 1)
times = st.integers(1_000, 1_010)
numbers = st.integers(0, 5)
usages = st.builds(Usage, numbers, numbers, numbers, numbers)
counts = st.builds(RequestCounts, numbers, numbers, numbers)
files = st.builds(File, file_ids, numbers, times, st.text("aé\n", max_size=3), st.sampled_from("xy"), st.just("00"))
changes = st.fixed_dictionaries(
    {},
    optional={
        "counts": counts,
        "usage": st.none() | usages,
        "errors": st.lists(st.builds(LineError, st.just("code"), st.text("ab"), st.none(), numbers)).map(tuple),
        "model": st.none() | st.just("tiny"),
        "metadata": st.none() | st.dictionaries(st.text("kè", max_size=2), st.text("vø", max_size=2)),
        "output_file_id": st.none() | file_ids,
        "merged_version": numbers,
        "colour": st.just("unknown"),
    },
)
summaries = st.builds(ChunkSummary, counts, usages, sent=numbers, finish_reasons=st.just({"stop": 1}))
UPLOAD_IDS = ("upload_a", "upload_b")
upload_ids = st.sampled_from(UPLOAD_IDS)
claims = st.none() | st.builds(Claim, st.just(ClaimKey("p", "uploads", "k")), st.sampled_from(["f1", "f2"]))
plans = st.sampled_from([(), (10,), (10, 5)])
events = st.sampled_from(BatchEvent)


class Twins(RuleBasedStateMachine):
    """Every rule calls both stores and compares what came out."""

    template: Path
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="twins-"))
        shutil.copy(self.template, self.folder / "batches.db")
        self.sql = open_store(f"sqlite:///{self.folder / 'batches.db'}")
        self.memory = MemoryStore()
        self.uploads: set[str] = set()
        self.parts = 0

    def teardown(self) -> None:
        self.sql.close()
        shutil.rmtree(self.folder)

    def both(self, call: Callable[[Store], Any]) -> Any:
        """Return what both returned, None when both raised."""
        outcomes = [outcome_of(call, store) for store in (self.sql, self.memory)]
        assert outcomes[0] == outcomes[1]
        return outcomes[0][1] if outcomes[0][0] == "returned" else None

    @initialize(status=st.sampled_from([BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING]))
    def begin_with_a_planned_batch(self, status: BatchStatus) -> None:
        self.both(lambda store: store.batches.add(a_batch("batch_a", 1_005, status)))
        self.plan("batch_a", (10, 5))

    @rule(file=files)
    def add_file(self, file: File) -> None:
        self.both(lambda store: store.files.add(file))

    @rule(file_id=file_ids)
    def delete_file(self, file_id: str) -> None:
        self.both(lambda store: store.files.delete(file_id))

    @rule(
        purpose=st.none() | st.sampled_from("xy"),
        after=st.none() | file_ids,
        limit=st.integers(1, 3),
        order=st.sampled_from(["asc", "desc"]),
    )
    def list_files(self, purpose: str | None, after: str | None, limit: int, order: str) -> None:
        self.both(lambda store: store.files.list(purpose=purpose, after=after, limit=limit, order=order))

    @rule(batch_id=batch_ids, now=times, totals=counts)
    def add_batch(self, batch_id: str, now: int, totals: RequestCounts) -> None:
        batch = replace(a_batch(batch_id, now, BatchStatus.VALIDATING), counts=totals)
        self.both(lambda store: store.batches.add(batch))

    @rule(after=st.none() | batch_ids, limit=st.integers(1, 3))
    def list_batches(self, after: str | None, limit: int) -> None:
        self.both(lambda store: store.batches.list(after=after, limit=limit))

    @rule(
        batch_id=batch_ids,
        event=events,
        now=times,
        new=st.lists(files, max_size=2),
        change=changes,
    )
    def advance(self, batch_id: str, event: BatchEvent, now: int, new: list[File], change: dict[str, Any]) -> None:
        self.both(lambda store: store.batches.advance(batch_id, event, now, files=new, **change))

    @rule(batch_id=batch_ids, new=st.lists(files, max_size=2), change=changes)
    def amend(self, batch_id: str, new: list[File], change: dict[str, Any]) -> None:
        self.both(lambda store: store.batches.amend(batch_id, files=new, **change))

    @rule(batch_id=batch_ids, lengths=plans)
    def plan(self, batch_id: str, lengths: tuple[int, ...]) -> None:
        ranges = [ChunkRange(index, 0, lines, 0, lines) for index, lines in enumerate(lengths)]
        self.both(lambda store: store.chunks.plan(batch_id, ranges))

    @rule(target=attempts, batch_id=batch_ids, index=indexes, fresh=st.booleans(), now=times)
    def begin(self, batch_id: str, index: int, fresh: bool, now: int) -> Attempt | MultipleResults[Attempt]:
        begun = self.both(lambda store: store.chunks.begin(batch_id, index, fresh=fresh, run_id="run", now=now))
        return begun if isinstance(begun, Attempt) else multiple()

    @rule(attempt=attempts, completed=numbers, failed=numbers, usage=usages)
    def report(self, attempt: Attempt, completed: int, failed: int, usage: Usage) -> None:
        self.both(lambda store: store.chunks.report(attempt, completed, failed, usage))

    @rule(attempt=attempts, summary=summaries, now=times)
    def publish(self, attempt: Attempt, summary: ChunkSummary, now: int) -> None:
        self.both(lambda store: store.chunks.publish(attempt, summary, now))

    @rule(attempt=attempts, outcome=st.sampled_from(["engine_failure", "stopped", "error"]), now=times)
    def give_back(self, attempt: Attempt, outcome: str, now: int) -> None:
        self.both(lambda store: store.chunks.give_back(attempt, outcome, now))

    @rule(upload_id=upload_ids, now=times, claim=claims)
    def add_upload(self, upload_id: str, now: int, claim: Claim | None) -> None:
        if upload_id in self.uploads:
            return  # ids are random: none comes twice
        upload = Upload(upload_id, "in", "x", 9, "text/plain", now, now + 3)
        if self.both(lambda store: store.uploads.add(upload, claim=claim)) == upload_id:
            self.uploads.add(upload_id)

    @rule(upload_id=upload_ids, size=numbers, now=times)
    def add_part(self, upload_id: str, size: int, now: int) -> None:
        self.parts += 1
        part = UploadPart(f"part_{self.parts}", upload_id, size, now)
        self.both(lambda store: store.uploads.add_part(part))

    @rule(upload_id=upload_ids, file_id=file_ids)
    def begin_completion(self, upload_id: str, file_id: str) -> None:
        self.both(lambda store: store.uploads.begin_completion(upload_id, file_id))

    @rule(upload_id=upload_ids, file=files, claim=claims)
    def complete_upload(self, upload_id: str, file: File, claim: Claim | None) -> None:
        self.both(lambda store: store.uploads.complete(upload_id, file, ("part_1",), "00", claim=claim))

    @rule(upload_id=upload_ids, status=st.sampled_from([UploadStatus.CANCELLED, UploadStatus.EXPIRED]))
    def close_upload(self, upload_id: str, status: UploadStatus) -> None:
        self.both(lambda store: store.uploads.close(upload_id, status))

    @rule(upload_id=upload_ids, forget=st.booleans())
    def clear_upload(self, upload_id: str, forget: bool) -> None:
        self.both(lambda store: store.uploads.delete(upload_id) if forget else store.uploads.drop_parts(upload_id))
        if forget:
            self.uploads.discard(upload_id)

    @invariant()
    def they_show_the_same_uploads(self) -> None:
        self.both(lambda store: store.uploads.stored_bytes(DEFAULT_PROJECT))
        self.both(lambda store: store.uploads.stale(1_006, 1_004, 9))
        for upload_id in UPLOAD_IDS:
            self.both(lambda store, upload_id=upload_id: store.uploads.get(upload_id))  # type: ignore[misc]
            self.both(lambda store, upload_id=upload_id: store.uploads.parts(upload_id))  # type: ignore[misc]
            self.both(lambda store, upload_id=upload_id: store.uploads.held(upload_id))  # type: ignore[misc]

    @invariant()
    def they_show_the_same(self) -> None:
        self.both(lambda store: store.files.list())
        self.both(lambda store: store.batches.list())
        self.both(lambda store: store.batches.open())
        for batch_id in BATCH_IDS:
            self.both(lambda store, batch_id=batch_id: store.chunks.list(batch_id))  # type: ignore[misc]
            self.both(lambda store, batch_id=batch_id: outbox(store, batch_id))  # type: ignore[misc]
            self.both(lambda store, batch_id=batch_id: store.chunks.attempts(batch_id, 0))  # type: ignore[misc]


def a_batch(batch_id: str, created_at: int, status: BatchStatus) -> Batch:
    return Batch(batch_id, "file-1", "/v1/embeddings", "24h", status, created_at, created_at + 9)


def outcome_of(call: Callable[[Store], Any], store: Store) -> tuple[str, Any]:
    """What the call returned, or the kind of its error."""
    try:
        result = call(store)
    except (BatchError, TypeError) as error:
        return "raised", type(error)
    if isinstance(result, list | tuple):
        return "returned", list(result)
    return "returned", result if not isinstance(result, Page) else (list(result.data), result.has_more)


def outbox(store: Store, batch_id: str) -> list[tuple[str, str, int]]:
    """Events without their random ids."""
    return [(event.batch_id, event.type, event.created_at) for event in store.events(batch_id)]


@pytest.mark.timeout(180)
def test_both_stores_answer_every_sequence_alike(sqlite_template: Path) -> None:
    Twins.template = sqlite_template
    run_state_machine_as_test(Twins, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
