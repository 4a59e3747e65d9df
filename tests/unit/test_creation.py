"""Rules for making files and batches (core/creation.py): ids, limits, and OpenAI's sentences."""

from collections.abc import Callable, Mapping
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.creation import (
    clean_filename,
    new_batch_id,
    new_file_id,
    read_batch_params,
    read_expiry,
    read_purpose,
    read_window,
)
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.models import ENDPOINTS

PARAMS = {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"}


@pytest.mark.parametrize("make_id", [new_file_id, new_batch_id])
def test_ids_are_long_unique_and_plain(make_id: Callable[[Callable[[int], bytes]], str]) -> None:
    drawn = count()
    ids = {make_id(lambda size: next(drawn).to_bytes(size, "big")) for _ in range(100)}

    assert len(ids) == 100
    assert all(len(made) >= 29 and made.replace("-", "").replace("_", "").isalnum() for made in ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"endpoint": "/v1/x"}, f"Invalid value: '/v1/x'. Supported values are: '{ENDPOINTS[0]}', "),
        ({"endpoint": None}, "Invalid type for 'endpoint': expected a string, but got null instead."),
        ({"endpoint": 1.5}, "Invalid type for 'endpoint': expected a string, but got a decimal number instead."),
        ({"completion_window": "1h"}, "Invalid value: '1h'. Supported values are: '24h'."),
        ({"completion_window": True}, "expected a string, but got a boolean instead."),
        ({"metadata": {"tags": []}}, "Invalid type for 'metadata.tags': expected a string, but got an array instead."),
        ({"metadata": {"k": "half \ud83d"}}, "Invalid 'metadata.k': the string holds"),
        ({"metadata": {"half \ud83d": "v"}}, "Invalid 'metadata': the string holds"),
        ({"input_file_id": "a\0b"}, "Invalid 'input_file_id': the string holds"),
        ({"output_expires_after": 3600}, "expected an object, but got an integer instead."),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            "Invalid 'output_expires_after.seconds': integer below minimum value. "
            "Expected a value >= 3600, but got 1 instead.",
        ),
        (
            {"metadata": {str(n): "" for n in range(17)}},
            "Invalid 'metadata': too many properties. Expected an object with at most 16 properties, "
            "but got an object with 17 properties instead.",
        ),
    ],
)
def test_refusals_have_openai_sentences(change: Mapping[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read_batch_params({**PARAMS, **change})
    assert message in refused.value.message


def test_small_rules() -> None:
    assert read_window("24h") == 86_400
    assert read_purpose("evals") == "evals"
    assert read_expiry(None, "expires_after") is None
    assert read_expiry({"anchor": "created_at", "seconds": 2_592_000}, "expires_after") == 2_592_000


@given(st.text())
def test_a_cleaned_filename_can_be_stored_and_shown(name: str) -> None:
    clean = clean_filename(name)

    assert 0 < len(clean) <= 255
    assert clean.isprintable()
    assert "/" not in clean
    assert clean.encode()
    assert clean_filename(clean) == clean
