"""Embedding inputs under the cap of requests (checklist 58): counted over all lines, as OpenAI's limit is."""

from typing import Any

import msgspec
import pytest

from tests.unit.conftest import Rig, request_line
from vllm_batch_dagster.core.lines import count_inputs
from vllm_batch_dagster.core.states import BatchStatus

EMBEDDINGS = "/v1/embeddings"


def line(name: str, value: object) -> bytes:
    return request_line(name, url=EMBEDDINGS, body={"model": "tiny", "input": value})


@pytest.mark.parametrize(
    ("value", "inputs"),
    [
        ("a text", 1),
        ("[1, 2]", 1),
        (["a", "b", "c"], 3),
        ([], 0),
        ([15496, 995], 1),
        ([[1, 2], [3], [4, 5]], 3),
        (["a, [b", '"c"'], 2),
        (None, 1),
    ],
)
def test_texts_and_lists_of_tokens_are_one_input_each(value: Any, inputs: int) -> None:
    assert count_inputs(msgspec.json.encode({"model": "m", "input": value})) == inputs
    spread = msgspec.json.format(msgspec.json.encode({"input": value}), indent=4)
    assert count_inputs(spread) == inputs


def test_a_body_without_input_is_one_request_all_the_same() -> None:
    assert count_inputs(b'{"model":"m"}') == 1


@pytest.mark.parametrize("metadata", [None, {"validation": "lenient"}])
def test_the_sum_over_all_lines_counts(rig: Rig, metadata: dict[str, str] | None) -> None:
    content = line("a", ["x"] * 3) + line("b", "y") + line("c", [[1, 2], [3]])
    for most, status in ((6, BatchStatus.IN_PROGRESS), (5, BatchStatus.FAILED)):
        batch_id = rig.create(rig.upload(content), EMBEDDINGS, metadata)
        rig.validate(batch_id, max_requests=most)
        assert rig.batch(batch_id).status is status
    (error,) = rig.batch(batch_id).errors
    assert (error.code, error.param, error.line) == ("too_many_embedding_inputs", "input_file_id", None)
    assert "6 embedding inputs; at most 5" in error.message


def test_other_endpoints_have_no_such_limit(rig: Rig) -> None:
    body = {"model": "tiny", "messages": [], "input": ["x"] * 9}
    batch_id = rig.create(rig.upload(request_line("a", body=body)))
    rig.validate(batch_id, max_requests=1)
    assert rig.batch(batch_id).status is BatchStatus.IN_PROGRESS
