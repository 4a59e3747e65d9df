"""Lenient validation and what follows: bad lines in the error file, models in groups, order kept, all counted."""

from itertools import groupby

import msgspec
import pytest

from tests.unit.conftest import CHAT, DAY, Rig, WatchedEngine, ids, line_of, request_line, request_lines
from vllm_batch_dagster.adapters.memory import EchoEngine, MemoryCatalog
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.models import Model, RequestCounts
from vllm_batch_dagster.core.modes import ValidationMode
from vllm_batch_dagster.core.ports import EngineManager
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.stages import inspection, partial
from vllm_batch_dagster.stages.partial import PartialResults

S = BatchStatus
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
OTHER = BODY | {"model": "other"}
LENIENT = {"validation": "lenient"}
Shown = list[tuple[str, str | None]]


def create(rig: Rig, *lines: bytes, endpoint: str = CHAT) -> str:
    return rig.create(rig.upload(b"".join(lines)), endpoint, LENIENT)


def start(rig: Rig, *lines: bytes, chunk_size: int = 5, **limits: int) -> str:
    batch_id = create(rig, *lines)
    report = rig.validate(batch_id, chunk_size, **limits)
    assert rig.batch(batch_id).status is S.IN_PROGRESS, report.errors
    return batch_id


async def infer(rig: Rig, batch_id: str, engine: EngineManager | None = None) -> None:
    """Run every chunk with its model, as the graph does."""
    chunks = rig.store.chunks.list(batch_id)
    for name, part in groupby(chunks, key=lambda chunk: chunk.range.model):
        model = rig.catalog.find(name or "")
        assert model is not None
        await rig.infer(batch_id, engine or EchoEngine(), only=[chunk.index for chunk in part], model=model)


async def finish(rig: Rig, batch_id: str) -> None:
    await infer(rig, batch_id)
    rig.merge(batch_id)


def reasons(rig: Rig, batch_id: str) -> Shown:
    return [(row["custom_id"], row["error"] and row["error"]["code"]) for row in rig.errors(batch_id)]


BAD: dict[str, tuple[bytes, str, str]] = {
    "no json": (b'{"custom_id": "x", \n', "invalid-line-2", "invalid_json_line"),
    "not utf-8": (b'{"custom_id": "\xff"}\n', "invalid-line-2", "invalid_json_line"),
    "no id": (request_line("x", custom_id=None), "invalid-line-2", "missing_required_parameter"),
    "id is a number": (request_line("x", custom_id=5), "invalid-line-2", "invalid_type"),
    "no body": (request_line("x", body=None), "x", "missing_required_parameter"),
    "foreign url": (request_line("x", url="/v1/images"), "x", "invalid_url"),
    "unknown model": (request_line("x", body=BODY | {"model": "gpt-9"}), "x", "model_not_found"),
    "streams": (request_line("x", body=BODY | {"stream": True}), "x", "streaming_unsupported"),
    "repeats an id": (request_line("a"), "invalid-line-2", "duplicate_custom_id"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_line_goes_to_the_error_file_and_the_others_run(rig: Rig, name: str) -> None:
    bad, custom_id, code = BAD[name]
    batch_id = start(rig, request_line("a"), bad, request_line("b"))
    batch = rig.batch(batch_id)
    assert (batch.counts, batch.rejected, batch.errors, batch.model) == (RequestCounts(3, 0, 1), 1, (), "tiny")
    await finish(rig, batch_id)
    assert ids(rig.output(batch_id)) == ["a", "b"]
    assert reasons(rig, batch_id) == [(custom_id, code)]
    (row,) = rig.errors(batch_id)
    assert list(row) == ["id", "custom_id", "response", "error"]
    assert row["id"].startswith("batch_req_")
    assert row["response"] is None
    assert row["error"]["message"]
    assert rig.batch(batch_id).counts == RequestCounts(3, 2, 1)
    assert rig.batch(batch_id).status is S.COMPLETED


async def test_the_server_may_be_lenient_and_a_batch_strict_on_it(rig: Rig) -> None:
    lines = request_line("a") + b"nonsense\n"
    rig.default_mode = ValidationMode.LENIENT
    lenient = rig.create(rig.upload(lines))
    assert rig.validate(lenient).rejected == 1
    assert rig.batch(lenient).status is S.IN_PROGRESS
    strict = rig.create(rig.upload(lines), metadata={"validation": "strict"})
    assert [error.line for error in rig.validate(strict).errors] == [2]
    assert rig.batch(strict).status is S.FAILED


def test_a_file_without_a_good_line_fails_with_the_list_of_strict_mode(rig: Rig) -> None:
    bad = request_line("a", method=None, url=None) + b"\nnonsense\n" + request_line("c", url="/v1/x")
    batch_id = create(rig, bad)
    rig.validate(batch_id)
    batch = rig.batch(batch_id)
    assert (batch.status, batch.counts, batch.rejected) == (S.FAILED, RequestCounts(), 0)
    assert [(error.code, error.param, error.line) for error in batch.errors] == [
        ("missing_required_parameter", "method", 1),
        ("missing_required_parameter", "url", 1),
        ("invalid_json_line", None, 3),
        ("invalid_url", "url", 4),
    ]
    assert not rig.workspace.index_path(batch_id).exists()


@pytest.mark.parametrize(
    ("content", "limit", "code"),
    [(b"\n \n", 0, "empty_file"), (request_lines(3) + b"nonsense\n", 3, "too_many_requests")],
)
def test_a_file_that_is_unusable_fails_in_lenient_mode_too(rig: Rig, content: bytes, limit: int, code: str) -> None:
    batch_id = create(rig, content)
    rig.validate(batch_id, max_requests=limit)
    assert [error.code for error in rig.batch(batch_id).errors] == [code]
    assert rig.batch(batch_id).status is S.FAILED


async def test_a_repeated_id_is_refused_on_the_later_line_whatever_was_wrong_with_the_first(rig: Rig) -> None:
    batch_id = start(
        rig,
        request_line("a", url="/v1/x"),
        request_line("a"),
        request_line("b"),
        request_line("b", method="GET"),
        request_line("b", body=OTHER),
        request_line("c"),
    )
    await finish(rig, batch_id)
    assert ids(rig.output(batch_id)) == ["b", "c"]
    assert reasons(rig, batch_id) == [
        ("a", "invalid_url"),
        ("invalid-line-2", "duplicate_custom_id"),
        ("invalid-line-4", "invalid_method"),
        ("invalid-line-5", "duplicate_custom_id"),
    ]
    assert rig.batch(batch_id).counts == RequestCounts(6, 2, 4)


async def test_ids_that_only_share_a_hash_are_no_duplicates(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(inspection, "hash_custom_id", lambda _custom_id: 7)
        report = rig.validate(create(rig, request_lines(5), request_line("id-1"), request_line("id-9")))
    assert [(error.code, error.line) for error in report.rejections] == [("duplicate_custom_id", 6)]


async def test_line_numbers_count_blank_lines_and_lines_over_the_limit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_batch_dagster.stages.input_lines.MAX_LINE_BYTES", 300)
    batch_id = start(rig, b"\n\n", request_line("a"), b"\n", request_line("a"), b"x" * 1000 + b"\r\n", b"{\n")
    await finish(rig, batch_id)
    assert reasons(rig, batch_id) == [
        ("invalid-line-5", "duplicate_custom_id"),
        ("invalid-line-6", "line_too_long"),
        ("invalid-line-7", "invalid_json_line"),
    ]


async def test_a_line_runs_on_its_own_url(rig: Rig) -> None:
    """Parasail's command line always names the chat endpoint, whatever the lines say (contract G.2.7)."""
    lines = [
        request_line("chat"),
        request_line("embed", url="/v1/embeddings", body={"model": "tiny", "input": "a cat"}),
        request_line("rerank", url="/v1/score", body={"model": "tiny", "query": "cat", "documents": ["a cat", "x"]}),
        request_line("score", url="/v1/score", body={"model": "tiny", "text_1": "a", "text_2": ["b"]}),
    ]
    batch_id = start(rig, *lines)
    engine = WatchedEngine()
    await infer(rig, batch_id, engine)
    sent = [request.endpoint for request in sorted(engine.requests, key=line_of)]
    assert sent == [CHAT, "/v1/embeddings", "/v1/rerank", "/v1/score"]
    rig.merge(batch_id)
    bodies = [row["response"]["body"] for row in rig.output(batch_id)]
    keys = ["choices", "data", "results", "data"]
    assert all(body[key] for body, key in zip(bodies, keys, strict=True))


async def test_more_models_than_a_batch_may_have(rig: Rig) -> None:
    names = [f"m{n}" for n in range(5)]
    rig.catalog = MemoryCatalog([Model(name, name) for name in names])
    lines = [request_line(f"id-{n}", body=BODY | {"model": names[n % 5]}) for n in range(10)]
    batch_id = start(rig, *lines, chunk_size=1, chunk_slots=3)
    assert [chunk.range.model for chunk in rig.store.chunks.list(batch_id)] == ["m0", "m1", "m2"]
    await finish(rig, batch_id)
    assert ids(rig.output(batch_id)) == ["id-0", "id-1", "id-2", "id-5", "id-6", "id-7"]
    assert {code for _name, code in reasons(rig, batch_id)} == {"too_many_models"}


@pytest.mark.parametrize("status", [S.CANCELLED, S.EXPIRED])
@pytest.mark.parametrize("answered", [False, True])
async def test_a_lenient_batch_that_stops_has_every_line_once(rig: Rig, status: BatchStatus, answered: bool) -> None:
    lines = [request_line(f"id-{n}", body=OTHER if n % 2 else BODY) for n in range(6)]
    batch_id = start(rig, *lines[:4], b"{\n", *lines[4:], chunk_size=2)
    if answered:
        await rig.infer(batch_id, EchoEngine(), only=[0])
    if status is S.CANCELLED:
        rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    else:
        rig.clock.advance(DAY)
    rig.merge(batch_id)
    batch, code = rig.batch(batch_id), f"batch_{status.value}"
    done = ["id-0", "id-2"] if answered else []
    assert ids(rig.output(batch_id)) == done
    expected = [(f"id-{n}", code) for n in range(4) if f"id-{n}" not in done]
    expected += [("invalid-line-5", "invalid_json_line"), ("id-4", code), ("id-5", code)]
    assert reasons(rig, batch_id) == expected
    assert (batch.status, batch.counts) == (status, RequestCounts(7, len(done), 7 - len(done)))


async def test_refused_lines_count_although_validation_was_cut_before_it_said_so(rig: Rig) -> None:
    """The process died between planning the chunks and moving the batch on; then the batch was cancelled."""
    batch_id = create(rig, request_lines(2), b"{\n")
    before = rig.batch(batch_id)
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    report = rig.validate(batch_id)
    rig.store.chunks.plan(batch_id, report.chunks)
    assert before.status is S.VALIDATING
    rig.merge(batch_id)
    assert rig.batch(batch_id).counts == RequestCounts(3, 0, 3)
    assert len(rig.errors(batch_id)) == 3


async def test_validating_again_repairs_the_index_and_changes_nothing_else(rig: Rig) -> None:
    lines = [request_line(f"id-{n}", body=OTHER if n % 2 else BODY) for n in range(5)]
    batch_id = start(rig, *lines, b"{\n", chunk_size=2)
    path = rig.workspace.index_path(batch_id)
    before = (rig.batch(batch_id), rig.store.chunks.list(batch_id), path.read_bytes())
    path.write_bytes(b"damaged")
    rig.validate(batch_id, chunk_size=3)
    assert (rig.batch(batch_id), rig.store.chunks.list(batch_id), path.read_bytes()) == before
    assert [each.name for each in path.parent.iterdir()] == ["index.bin"]


@pytest.mark.parametrize("change", ["a model is gone", "the server is strict"])
async def test_validating_again_keeps_an_index_that_would_be_another(rig: Rig, change: str) -> None:
    rig.default_mode = ValidationMode.LENIENT
    batch_id = rig.create(rig.upload(request_line("a") + request_line("b", body=OTHER) + b"{\n"))
    rig.validate(batch_id)
    index = rig.workspace.index_path(batch_id).read_bytes()
    if change == "a model is gone":
        rig.catalog = MemoryCatalog([Model("tiny", "t")])
    else:
        rig.default_mode = ValidationMode.STRICT
    rig.validate(batch_id)
    assert rig.workspace.index_path(batch_id).read_bytes() == index


async def test_refused_lines_are_among_the_partial_results_from_the_start(rig: Rig) -> None:
    batch_id = start(rig, b"no json\n", request_line("a"), request_line("b", url="/v1/images"), request_line("c"))
    ports = (rig.store, rig.files, rig.workspace)

    def results(after: str = "", *, with_errors: bool = True) -> tuple[list[str], str]:
        reader = PartialResults(rig.batch(batch_id), *ports, after=after, with_errors=with_errors)
        cursor = str(reader.freeze())
        blocks = iter(reader.next_block, b"")
        return [msgspec.json.decode(line)["custom_id"] for block in blocks for line in block.splitlines()], cursor

    assert results(with_errors=False) == ([], "v1")
    assert results() == (["invalid-line-1", "b"], "v1_r2")
    assert results("v1_r1") == (["b"], "v1_r2")
    with pytest.raises(InvalidInput, match="is no cursor of these results"):
        results("v1_r3")
    await finish(rig, batch_id)
    given, end = results("v1_r2")
    assert (given, end) == (["a", "c"], "v1_r2_0-0")
    assert results(end) == ([], end)
    assert sorted(ids(rig.errors(batch_id))) == ["b", "invalid-line-1"]


def test_a_reader_of_refused_lines_knows_where_it_stands_between_them(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "BLOCK_BYTES", 1)
    batch_id = start(rig, b"1\n", b"2\n", request_line("a"))
    reader = PartialResults(rig.batch(batch_id), rig.store, rig.files, rig.workspace, with_errors=True)
    reader.refresh()
    stands = [str(reader.cursor) for _ in iter(reader.next_block, b"")]
    assert stands == ["v1_r1", "v1_r2"]


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ([b"1\n", request_line("invalid-line-1")], ["invalid-line-1-"]),
        ([request_line("invalid-line-2"), b"2\n"], ["invalid-line-2-"]),
        ([b"1\n", request_line("invalid-line-1"), request_line("invalid-line-9--")], ["invalid-line-1---"]),
        ([b"1\n", request_line("invalid-line-1", url="/v1/images")], ["invalid-line-1-", "invalid-line-1"]),
        ([b"1\n", request_line("invalid-line-x"), request_line("invalid-line-")], ["invalid-line-1"]),
        ([request_line("invalid-line-2"), request_line("invalid-line-2")], ["invalid-line-2-"]),
    ],
)
async def test_our_names_are_never_those_of_the_user(rig: Rig, lines: list[bytes], names: list[str]) -> None:
    batch_id = start(rig, *lines, request_line("z"))
    await finish(rig, batch_id)
    assert ids(rig.errors(batch_id)) == names
    everything = ids(rig.errors(batch_id)) + ids(rig.output(batch_id))
    assert len(everything) == len(set(everything)) == len(lines) + 1
