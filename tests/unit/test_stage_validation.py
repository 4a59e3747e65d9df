"""The validation stage: what makes a batch `failed` and with which list of errors, what it plans, what it writes."""

import msgspec
import pytest

from tests.unit.conftest import Rig, request_line, request_lines
from vllm_batch_dagster.adapters.memory import MemoryCatalog
from vllm_batch_dagster.core.byteindex import read_count, read_entries
from vllm_batch_dagster.core.duplicates import DuplicateFilter
from vllm_batch_dagster.core.lines import hash_custom_id
from vllm_batch_dagster.core.models import ChunkRange, LineError
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.stages import input_lines, inspection
from vllm_batch_dagster.stages.validation import ValidationLimits, validate_batch

BODY = {"model": "tiny", "messages": []}
Found = list[tuple[str, str | None, int | None]]


def failure(rig: Rig, content: bytes, **limits: int) -> Found:
    """Validate `content`, which must fail; return its errors as the batch shows them."""
    batch_id = rig.create(rig.upload(content))
    return failure_of(rig, batch_id, **limits)


def failure_of(rig: Rig, batch_id: str, **limits: int) -> Found:
    report = rig.validate(batch_id, **limits)
    batch = rig.batch(batch_id)
    assert batch.status is BatchStatus.FAILED
    assert batch.failed_at == int(rig.clock())
    assert batch.errors == report.errors
    assert all(error.message for error in batch.errors)
    assert not report.chunks
    assert not rig.store.chunks.list(batch_id)
    return [(error.code, error.param, error.line) for error in batch.errors]


def indexed_lines(rig: Rig, batch_id: str) -> list[bytes]:
    """The byte ranges of the input that the index names."""
    with (
        rig.workspace.index_path(batch_id).open("rb") as index,
        rig.files.open(rig.batch(batch_id).input_file_id) as source,
    ):
        whole = source.read()
        return [
            whole[entry.offset : entry.offset + entry.length] for entry in read_entries(index, 0, read_count(index))
        ]


@pytest.mark.parametrize("content", [b"", b"\n", b"\n \t\r\n\r\n   "])
def test_a_file_without_a_request_is_empty(rig: Rig, content: bytes) -> None:
    assert failure(rig, content) == [("empty_file", "input_file_id", None)]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (b'{"custom_id": "x", \n', ("invalid_json_line", None)),
        (request_line("x", custom_id=None), ("missing_required_parameter", "custom_id")),
        (request_line("x", method=None), ("missing_required_parameter", "method")),
        (request_line("x", url=None), ("missing_required_parameter", "url")),
        (request_line("x", body=None), ("missing_required_parameter", "body")),
        (request_line("x", url="/v1/embeddings"), ("invalid_url", "url")),
        (request_line("x", body=BODY | {"model": "gpt-9"}), ("model_not_found", "body.model")),
        (request_line("x", body=BODY | {"model": "other"}), ("mismatched_model", "body.model")),
        (request_line("x", body=BODY | {"stream": True}), ("streaming_unsupported", "body.stream")),
        (request_line("a"), ("duplicate_custom_id", "custom_id")),
    ],
)
def test_one_bad_line_fails_the_batch_and_is_named(rig: Rig, bad: bytes, expected: tuple[str, str | None]) -> None:
    assert failure(rig, request_line("a") + request_line("b") + bad + request_line("c")) == [(*expected, 3)]


def test_every_bad_line_is_listed_in_the_order_of_the_file(rig: Rig) -> None:
    content = b"\n".join(
        [
            request_line("a", method=None, url=None).strip(),
            request_line("b").strip(),
            b"",
            request_line("b").strip() + b"\r",
            b"nonsense",
            request_line("c").strip(),
            request_line("b").strip(),
            request_line("c", body=BODY | {"stream": True}).strip(),
        ]
    )
    assert failure(rig, content) == [
        ("missing_required_parameter", "method", 1),
        ("missing_required_parameter", "url", 1),
        ("duplicate_custom_id", "custom_id", 4),
        ("invalid_json_line", None, 5),
        ("duplicate_custom_id", "custom_id", 7),
        ("streaming_unsupported", "body.stream", 8),
    ]


def test_the_list_of_errors_is_cut_after_sorting(rig: Rig) -> None:
    content = request_line("a") + request_line("a") + b"nonsense\n" * 10
    assert [line for _code, _param, line in failure(rig, content, max_errors=4)] == [2, 3, 4, 5]
    content = b"nonsense\n" * 10 + request_line("a") + request_line("a")
    assert [line for _code, _param, line in failure(rig, content, max_errors=4)] == [1, 2, 3, 4]
    content = request_line("a") * 10
    assert [line for _code, _param, line in failure(rig, content, max_errors=4)] == [2, 3, 4, 5]


def test_more_requests_than_allowed(rig: Rig) -> None:
    assert failure(rig, request_lines(4), max_requests=3) == [("too_many_requests", "input_file_id", None)]
    assert rig.validate(rig.create(rig.upload(request_lines(3))), max_requests=3).errors == ()


def test_ids_that_only_look_alike_to_the_filter_are_no_duplicates(rig: Rig) -> None:
    content = request_lines(2000)
    table = DuplicateFilter(len(content))
    for number in range(2000):
        table.add(hash_custom_id(f"id-{number}"))
    assert table.suspects  # else this file tests nothing
    assert rig.validate(rig.create(rig.upload(content))).errors == ()
    twice = content + request_line("id-7")
    assert failure(rig, twice) == [("duplicate_custom_id", "custom_id", 2001)]


def test_ids_with_the_same_hash_are_compared_themselves(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "hash_custom_id", lambda _custom_id: 7)
    assert rig.validate(rig.create(rig.upload(request_lines(5)))).errors == ()
    assert failure(rig, request_lines(5) + request_line("id-1")) == [("duplicate_custom_id", "custom_id", 6)]


def test_a_file_for_another_purpose(rig: Rig) -> None:
    batch_id = rig.create(rig.upload(request_lines(1), purpose="user_data"))
    assert failure_of(rig, batch_id) == [("invalid_request", "file_id", None)]
    assert "'user_data'" in rig.batch(batch_id).errors[0].message


@pytest.mark.parametrize("loss", ["never was", "expired", "deleted", "contents gone"])
def test_an_input_file_that_is_not_there(rig: Rig, loss: str) -> None:
    file_id = rig.upload(request_lines(1), expires_at=int(rig.clock()) + 3600)
    batch_id = rig.create("file-unknown" if loss == "never was" else file_id)
    if loss == "expired":
        rig.clock.advance(3600)
    if loss == "deleted":
        rig.store.files.delete(file_id)
    if loss in ("deleted", "contents gone"):
        rig.files.delete(file_id)
    assert failure_of(rig, batch_id) == [("invalid_request", "file_id", None)]
    assert rig.batch(batch_id).input_file_id in rig.batch(batch_id).errors[0].message


def test_a_file_is_read_until_the_second_in_which_it_expires(rig: Rig) -> None:
    file_id = rig.upload(request_lines(1), expires_at=int(rig.clock()) + 3600)
    rig.clock.advance(3599)
    assert rig.validate(rig.create(file_id)).errors == ()


def test_line_ends_and_blank_lines_do_not_count(rig: Rig) -> None:
    first, second, third = (request_line(name).strip() for name in "abc")
    batch_id = rig.start(b"\n" + first + b"\r\n\r\n  \n" + second + b"\n\n" + third)
    assert indexed_lines(rig, batch_id) == [first, second, third]
    assert rig.batch(batch_id).counts.total == 3


def test_a_line_over_the_limit_is_one_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 200
    monkeypatch.setattr(input_lines, "MAX_LINE_BYTES", limit)
    pad = request_line("b").strip()
    exact, over = pad + b" " * (limit - len(pad)), pad + b" " * (limit + 1 - len(pad))
    hidden = over + request_line("hidden").strip()  # a second request behind the first
    content = b"\n".join([exact, exact.replace(b'"b"', b'"c"') + b"\r", over, hidden, b"x" * 10 * limit, b"nonsense"])
    assert failure(rig, content) == [
        ("line_too_long", None, 3),
        ("line_too_long", None, 4),
        ("line_too_long", None, 5),
        ("invalid_json_line", None, 6),
    ]


def test_a_line_over_the_limit_at_the_end_of_the_file(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_lines, "MAX_LINE_BYTES", 200)
    assert failure(rig, request_line("a") + b"x" * 201) == [("line_too_long", None, 2)]


def test_a_line_nested_too_deep_is_a_bad_line_and_not_a_crash(rig: Rig) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    line = request_line("x", body=BODY | {"messages": msgspec.Raw(deep)})
    assert failure(rig, request_line("a") + line) == [("invalid_json_line", None, 2)]


def test_messages_do_not_grow_with_what_the_user_sent(rig: Rig) -> None:
    batch_id = rig.create(rig.upload(request_line("a", body=BODY | {"model": "m" * 100_000})))
    rig.validate(batch_id)
    assert len(rig.batch(batch_id).errors[0].message) < 500


def test_a_good_file_is_planned(rig: Rig) -> None:
    content = b"".join(request_line(f"id-{n}", body=BODY | {"model": "small"}) for n in range(12))
    batch_id = rig.create(rig.upload(content))
    rig.clock.advance(5)
    report = rig.validate(batch_id, chunk_size=5)
    batch = rig.batch(batch_id)
    assert (batch.status, batch.in_progress_at) == (BatchStatus.IN_PROGRESS, int(rig.clock()))
    assert (batch.counts.total, batch.model, batch.errors) == (12, "tiny", ())
    assert (report.lines, report.bytes) == (12, len(content))
    assert sum(count for _bound, count in report.lengths) == 12
    ranges = [chunk.range for chunk in rig.store.chunks.list(batch_id)]
    assert [(part.first_line, part.line_count) for part in ranges] == [(0, 5), (5, 5), (10, 2)]
    lines = [msgspec.json.decode(line)["custom_id"] for line in indexed_lines(rig, batch_id)]
    assert lines == [f"id-{n}" for n in range(12)]


def test_validating_again_rewrites_the_same_index_and_nothing_else(rig: Rig) -> None:
    batch_id = rig.start(12)
    path = rig.workspace.index_path(batch_id)
    before = (rig.batch(batch_id), rig.store.chunks.list(batch_id), path.read_bytes())
    path.write_bytes(b"damaged")
    rig.clock.advance(60)
    rig.validate(batch_id, chunk_size=3)
    assert (rig.batch(batch_id), rig.store.chunks.list(batch_id), path.read_bytes()) == before


def test_validating_again_never_fails_a_batch_that_runs(rig: Rig) -> None:
    batch_id = rig.start(3)
    rig.files.delete(rig.batch(batch_id).input_file_id)
    before, index = rig.batch(batch_id), rig.workspace.index_path(batch_id).read_bytes()
    assert rig.validate(batch_id).errors
    assert rig.batch(batch_id) == before
    assert rig.workspace.index_path(batch_id).read_bytes() == index


def test_validating_again_keeps_the_index_that_the_batch_works_with(rig: Rig) -> None:
    """The operator has taken the model out of the catalogue meanwhile."""
    batch_id = rig.start(3)
    index = rig.workspace.index_path(batch_id).read_bytes()
    rig.catalog = MemoryCatalog([])
    assert len(rig.validate(batch_id).errors) == 3
    assert rig.workspace.index_path(batch_id).read_bytes() == index
    assert [path.name for path in rig.workspace.index_path(batch_id).parent.iterdir()] == ["index.bin"]


def test_a_batch_cancelled_while_it_is_validated_ends_quietly(rig: Rig) -> None:
    batch_id = rig.create(rig.upload(request_lines(3)))
    before = rig.batch(batch_id)
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    limits = ValidationLimits(chunk_size=2, chunk_slots=4)
    validate_batch(before, rig.store, rig.files, rig.workspace, rig.catalog, limits, rig.clock)
    assert rig.batch(batch_id).status is BatchStatus.CANCELLING


def test_validation_that_was_cut_is_done_again_with_other_chunks(rig: Rig) -> None:
    batch_id = rig.create(rig.upload(request_lines(6)))
    # As if the process had died between planning the chunks and moving the batch on.
    rig.store.chunks.plan(batch_id, (ChunkRange(0, 0, 6, 0, 700),))
    rig.validate(batch_id, chunk_size=2)
    assert [chunk.range.line_count for chunk in rig.store.chunks.list(batch_id)] == [2, 2, 2]
    assert rig.batch(batch_id).status is BatchStatus.IN_PROGRESS


def test_a_batch_cancelled_meanwhile_stays_cancelled(rig: Rig) -> None:
    batch_id = rig.create(rig.upload(b"nonsense"))
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    report = rig.validate(batch_id)
    assert report.errors == (LineError("invalid_json_line", report.errors[0].message, None, 1),)
    assert rig.batch(batch_id).status is BatchStatus.CANCELLING
