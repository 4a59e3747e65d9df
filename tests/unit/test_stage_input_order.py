"""Several models and refused lines in one file: whatever the groups they ran in, they come out in the file's order."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.conftest import Rig, WatchedEngine, answer_of, ids, request_line, request_lines
from tests.unit.test_stage_leniency import BODY, OTHER, create, finish, infer, reasons, start
from vllm_batch_dagster.adapters.memory import MemoryFiles
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.models import RequestCounts
from vllm_batch_dagster.core.states import BatchStatus


async def test_models_run_in_groups_and_come_out_in_the_order_of_the_file(rig: Rig) -> None:
    names = ["tiny", "other", "small", "other", "tiny", "other", "other", "tiny"]  # small is another name of tiny
    lines = [request_line(f"id-{n}", body=BODY | {"model": name}) for n, name in enumerate(names)]
    batch_id = start(rig, *lines[:3], b"nonsense\n", *lines[3:], chunk_size=2)
    assert rig.batch(batch_id).model is None
    ranges = [chunk.range for chunk in rig.store.chunks.list(batch_id)]
    assert [(part.model, part.first_line, part.line_count) for part in ranges] == [
        ("tiny", 0, 2),
        ("tiny", 2, 2),
        ("other", 4, 2),
        ("other", 6, 2),
    ]
    await finish(rig, batch_id)
    assert ids(rig.output(batch_id)) == [f"id-{n}" for n in range(8)]
    asked = [row["response"]["body"]["model"] for row in rig.output(batch_id)]
    assert asked == ["tiny", "other", "tiny", "other", "tiny", "other", "other", "tiny"]
    assert reasons(rig, batch_id) == [("invalid-line-4", "invalid_json_line")]


async def test_the_error_file_is_in_the_order_of_the_input_too(rig: Rig) -> None:
    lines = [request_line(f"id-{n}", body=OTHER if n % 3 else BODY) for n in range(7)]
    batch_id = start(rig, lines[0], b"{\n", *lines[1:5], b"[\n", *lines[5:], chunk_size=2)
    refuse = WatchedEngine(lambda request: answer_of(b'{"error":{"message":"no"}}', 400))
    await infer(rig, batch_id, refuse)
    rig.merge(batch_id)
    expected = ["id-0", "invalid-line-2", *(f"id-{n}" for n in range(1, 5)), "invalid-line-7", "id-5", "id-6"]
    assert ids(rig.errors(batch_id)) == expected
    assert rig.output(batch_id) == []


async def test_chunks_that_do_not_cover_the_index_are_not_merged(rig: Rig) -> None:
    batch_id = start(rig, request_lines(3))
    other = start(rig, request_lines(4))
    await infer(rig, batch_id)
    rig.workspace.index_path(batch_id).write_bytes(rig.workspace.index_path(other).read_bytes())
    with pytest.raises(StorageFailure, match="its byte index 4: materialize validated_input again"):
        rig.merge(batch_id)
    assert rig.batch(batch_id).output_file_id is None


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    rig = Rig(tmp_path_factory.mktemp("rig"))
    rig.files = MemoryFiles()
    return rig


KINDS: Sequence[bytes | dict[str, Any]] = (
    {"body": BODY},
    {"body": OTHER},
    {"body": OTHER, "url": "/v1/completions"},
    {"body": BODY, "url": "/v1/none"},
    {"body": BODY, "custom_id": None},
    b"\n",
    b"broken\n",
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 6)), min_size=1, max_size=14), st.integers(1, 4))
async def test_any_file_comes_out_whole_in_order_and_under_different_ids(
    long_lived: Rig, parts: list[tuple[bytes | dict[str, Any], int]], chunk_size: int
) -> None:
    rig = long_lived
    lines = [kind if isinstance(kind, bytes) else request_line(f"id-{name}", **kind) for kind, name in parts]
    batch_id = create(rig, *lines)
    report = rig.validate(batch_id, chunk_size)
    if rig.batch(batch_id).status is BatchStatus.FAILED:
        assert report.errors
        return
    await finish(rig, batch_id)
    batch, output, errors = rig.batch(batch_id), rig.output(batch_id), rig.errors(batch_id)
    total = sum(line != b"\n" for line in lines)
    assert batch.counts == RequestCounts(total, len(output), len(errors))
    assert len(output) + len(errors) == total
    assert len({*ids(output), *ids(errors)}) == total
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        numbers[f"invalid-line-{number}"] = number
        if line.startswith(b"{"):
            numbers.setdefault(msgspec.json.decode(line).get("custom_id", ""), number)
    for rows in (output, errors):
        places = [numbers[name] for name in ids(rows)]
        assert places == sorted(places)
