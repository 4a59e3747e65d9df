"""A retry is a new batch of exactly the lines without a good answer, byte for byte, linked to its parent."""

import secrets
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.conftest import CHAT, DAY, Rig, WatchedEngine, answer, request_line, request_lines
from vllm_batch_dagster.core.claims import BATCHES, ClaimKey
from vllm_batch_dagster.core.errors import InvalidInput, NotFound, StateConflict, StorageFailure
from vllm_batch_dagster.core.limits import StorageRoom
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.modes import ValidationMode
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.core.windows import WindowRule
from vllm_batch_dagster.stages.retrying import NOTHING_TO_RETRY, RETRY_OF, RetryPorts, retry_batch


def ports(rig: Rig, **options: Any) -> RetryPorts:
    return RetryPorts(rig.store, rig.files, rig.workspace, rig.clock, secrets.token_bytes, WindowRule.ANY, **options)


def retry(rig: Rig, batch_id: str, **params: object) -> Batch:
    return retry_batch(rig.batch(batch_id), params, ports(rig))


def ended(rig: Rig, content: bytes, good: set[int], *, event: BatchEvent | None = None) -> str:
    """A batch whose lines `good` have an answer, the others an error of the engine, or none when it was cancelled."""
    batch_id = rig.start(content)
    for chunk in rig.store.chunks.list(batch_id):
        attempt = rig.begin(batch_id, chunk.index)
        for line in list(attempt.pending_lines()):
            if line.line in good or event is None:
                answer(line, ok=line.line in good)
        if event is None:
            attempt.publish()
        attempt.close()
    if event is not None:
        rig.store.batches.advance(batch_id, event, int(rig.clock()))
    rig.merge(batch_id)
    return batch_id


def content_of(rig: Rig, batch: Batch) -> bytes:
    return b"".join(rig.stored_lines(batch.input_file_id))


def test_the_failed_lines_are_copied_byte_for_byte_in_input_order(rig: Rig) -> None:
    lines = [request_line(f"id-{number}").replace(b":", b" : ") for number in range(12)]
    batch_id = ended(rig, b"\n".join(lines).rstrip(b"\n"), set(range(12)) - {1, 6, 11})
    made = retry(rig, batch_id)
    assert content_of(rig, made) == b"".join(lines[number] for number in (1, 6, 11))
    record = rig.store.files.get(made.input_file_id)
    assert (record.filename, record.purpose) == (f"{batch_id}_retry.jsonl", "batch")
    assert rig.store.batches.get(made.id) == made
    assert (made.status, made.endpoint, made.completion_window) == (BatchStatus.VALIDATING, CHAT, "24h")
    assert made.metadata == {RETRY_OF: batch_id}
    assert rig.validate(made.id).errors == ()


def test_lines_that_never_ran_are_retried(rig: Rig) -> None:
    batch_id = ended(rig, request_lines(12), {0, 7}, event=BatchEvent.CANCEL)
    assert rig.batch(batch_id).status is BatchStatus.CANCELLED
    made = retry(rig, batch_id)
    assert content_of(rig, made).count(b"\n") == 10
    assert b'"id-0"' not in content_of(rig, made)


def test_a_batch_that_was_stopped_before_validation_is_retried_whole(rig: Rig) -> None:
    content = request_lines(3)
    batch_id = rig.create(rig.upload(content))
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    rig.merge(batch_id)
    made = retry(rig, batch_id)
    assert content_of(rig, made) == content
    assert made.input_file_id != rig.batch(batch_id).input_file_id


async def test_what_the_retry_heals_is_nothing_to_retry(rig: Rig) -> None:
    batch_id = ended(rig, request_lines(12), {0})
    made = retry(rig, batch_id)
    rig.validate(made.id)
    await rig.infer(made.id, WatchedEngine())
    rig.merge(made.id)
    assert rig.batch(made.id).status is BatchStatus.COMPLETED
    with pytest.raises(InvalidInput, match="every request") as refusal:
        retry(rig, made.id)
    assert refusal.value.code == NOTHING_TO_RETRY


def test_an_open_batch_is_refused(rig: Rig) -> None:
    with pytest.raises(StateConflict, match="in_progress"):
        retry(rig, rig.start(2))


def test_a_failed_batch_says_that_its_input_must_be_mended(rig: Rig) -> None:
    batch_id = rig.create(rig.upload(b"nonsense\n"))
    rig.validate(batch_id)
    with pytest.raises(InvalidInput, match="did not pass validation"):
        retry(rig, batch_id)


def test_refused_lines_of_a_lenient_batch_are_not_retried(rig: Rig) -> None:
    rig.default_mode = ValidationMode.LENIENT
    batch_id = ended(rig, request_lines(2) + b"nonsense\n", {0})
    assert content_of(rig, retry(rig, batch_id)) == request_line("id-1")
    whole = ended(rig, request_lines(2) + b"nonsense\n", {0, 1})
    with pytest.raises(InvalidInput, match="Mend them"):
        retry(rig, whole)


def test_parameters_replace_those_of_the_parent(rig: Rig) -> None:
    batch_id = ended(rig, request_lines(2), {0})
    rig.store.batches.amend(batch_id, metadata={"team": "a", RETRY_OF: "batch_0"}, output_expires_after=7200)
    inherited = retry(rig, batch_id)
    assert inherited.metadata == {"team": "a", RETRY_OF: batch_id}
    assert inherited.output_expires_after == 7200
    made = retry(rig, batch_id, completion_window="2h", metadata={"x": "y"})
    assert made.metadata == {"x": "y", RETRY_OF: batch_id}
    assert (made.completion_window, made.expires_at - made.created_at) == ("2h", 7200)
    assert retry(rig, batch_id, metadata=None).metadata == {RETRY_OF: batch_id}


def test_full_metadata_has_no_room_for_the_link(rig: Rig) -> None:
    batch_id = ended(rig, request_lines(2), {0})
    pairs = {f"key-{number}": "x" for number in range(16)}
    rig.store.batches.amend(batch_id, metadata=pairs)
    before = stored_files(rig)
    with pytest.raises(InvalidInput, match="no room") as refusal:
        retry(rig, batch_id)
    assert (refusal.value.param, stored_files(rig)) == ("metadata", before)
    assert retry(rig, batch_id, metadata={}).metadata == {RETRY_OF: batch_id}


@pytest.mark.parametrize("params", [{"completion_window": "soon"}, {"metadata": "x"}, {"metadata": {"a": 1}}])
def test_a_wrong_parameter_leaves_no_file(rig: Rig, params: dict[str, object]) -> None:
    batch_id = ended(rig, request_lines(2), {0})
    before = stored_files(rig)
    with pytest.raises(InvalidInput):
        retry(rig, batch_id, **params)
    assert stored_files(rig) == before


def test_a_missing_input_file_is_not_found(rig: Rig) -> None:
    batch_id = ended(rig, request_lines(2), {0})
    input_file = rig.batch(batch_id).input_file_id
    rig.store.files.delete(input_file)
    with pytest.raises(NotFound) as missing:
        retry(rig, batch_id)
    assert missing.value.object_id == input_file


def test_an_expired_input_file_is_not_found(rig: Rig) -> None:
    batch_id = rig.create(rig.upload(request_lines(1), expires_at=int(rig.clock()) + 10))
    rig.store.batches.advance(batch_id, BatchEvent.DEADLINE, int(rig.clock()))
    rig.clock.now += 10
    with pytest.raises(NotFound):
        retry(rig, batch_id)


def test_the_limit_of_a_project_holds_and_nothing_is_left(rig: Rig) -> None:
    batch_id = ended(rig, request_lines(2), set())
    before = stored_files(rig)
    with pytest.raises(InvalidInput):
        retry_batch(rig.batch(batch_id), {}, ports(rig, room=StorageRoom("default", 0, 10)))
    assert stored_files(rig) == before


def test_the_retry_belongs_to_the_project_of_its_parent(rig: Rig) -> None:
    now = int(rig.clock())
    file_id = rig.upload(request_lines(1))
    rig.store.files.delete(file_id)
    record = replace(rig.store.files.get(rig.upload(b"x")), id=file_id, project_id="blue")
    rig.store.files.add(record)
    rig.store.batches.add(
        Batch("batch_blue", file_id, CHAT, "24h", BatchStatus.CANCELLED, now, now + DAY, project_id="blue")
    )
    made = retry(rig, "batch_blue")
    assert (made.project_id, rig.store.files.get(made.input_file_id).project_id) == ("blue", "blue")


def test_the_same_key_makes_one_retry(rig: Rig) -> None:
    batch_id = ended(rig, request_lines(2), {0})
    key, repeats = ClaimKey("default", BATCHES, "once"), []
    first, again = (
        retry_batch(rig.batch(batch_id), {}, ports(rig), claim_key=key, on_repeat=lambda: repeats.append(1))
        for _ in range(2)
    )
    assert first.id == again.id
    assert repeats == [1]


def test_a_store_that_fails_leaves_no_file(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = ended(rig, request_lines(2), {0})
    before = stored_files(rig)

    def fail(*_: object, **__: object) -> str:
        raise StorageFailure("the database is away")

    monkeypatch.setattr(rig.store.batches, "add", fail)
    with pytest.raises(StorageFailure):
        retry(rig, batch_id)
    assert stored_files(rig) == before
    assert len(rig.store.files.list().data) == before


def stored_files(rig: Rig) -> int:
    return sum(1 for path in (rig.folder / "files").rglob("*") if path.is_file())
