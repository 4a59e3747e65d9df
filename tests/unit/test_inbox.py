"""The rules of the drop folder: when a file is whole, what an order may say, and which ids a drop gets."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.creation import new_batch_id, read_batch_params
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.inbox import (
    Look,
    drop_id,
    guess_endpoint,
    is_dropped_file,
    is_whole,
    order_names,
    randomness_of,
    read_order,
)

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("look", "whole"),
    [
        (Look(age=5, ends_a_line=True), True),
        (Look(age=1, ends_a_line=True), False),
        (Look(age=5, ends_a_line=True, is_open=True), False),
        (Look(age=9000, ends_a_line=True, is_open=True), False),
        (Look(age=5, ends_a_line=True, is_open=False), True),
        (Look(age=5, ends_a_line=False), False),
        (Look(age=61, ends_a_line=False), True),
        (Look(age=-9000, ends_a_line=True), True),
    ],
)
def test_a_file_is_whole_when_nobody_writes_it(look: Look, whole: bool) -> None:
    """A clock of another machine, hours ahead, holds no file back."""
    assert is_whole(look, settle_seconds=3) is whole


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "very long name.jsonl"])
def test_dropped_files(name: str) -> None:
    assert is_dropped_file(name)


@pytest.mark.parametrize("name", [".a.jsonl", "a.jsonl.part", "a.json", "a.yaml", "done"])
def test_other_names_are_left_alone(name: str) -> None:
    assert not is_dropped_file(name)


def test_the_names_of_an_order() -> None:
    assert order_names("a.b.jsonl") == ("a.b.yaml", "a.b.yml")


@given(st.text(min_size=0, max_size=300).filter(lambda stem: "/" not in stem and "\0" not in stem))
def test_a_drop_has_a_name_that_every_disk_takes(stem: str) -> None:
    name = drop_id(f"{stem}.jsonl", 1_790_000_000.5, b"\x9f\x2c\x7a\x1b")
    assert name.endswith("-20260921-141320-9f2c7a1b")
    assert not name.startswith(".")
    assert "/" not in name
    assert len(name.encode()) < 255


def test_the_ids_of_a_drop_are_the_same_each_time_and_unlike_all_others() -> None:
    ids = {new_batch_id(randomness_of(drop, role)) for drop in ("a", "b") for role in ("file", "batch") for _ in "12"}
    assert len(ids) == 4


def test_without_an_order_the_first_line_says_the_endpoint() -> None:
    order = read_order(None)
    params = order.with_file("file-1", guess_endpoint(b'{"custom_id":"a","url":"/v1/embeddings","body":{}}\n'))
    assert read_batch_params(params).endpoint == "/v1/embeddings"
    assert (params["completion_window"], order.project_id) == ("24h", "default")


@pytest.mark.parametrize("line", [b"", b"not json", b"[]", b'{"url": 3}', b'{"url": "/v1/unknown"}', b"\xff"])
def test_a_first_line_that_says_nothing_means_chat(line: bytes) -> None:
    assert guess_endpoint(line) == CHAT


def test_a_full_order() -> None:
    order = read_order(
        {
            "endpoint": "/v1/embeddings",
            "completion_window": "24h",
            "validation": "lenient",
            "handlers": ["s3", "webhook"],
            "metadata": {"team": "search", "round": 3, "share": 0.5, "final": True},
            "output_expires_after": 7200,
            "project": "search",
        }
    )
    checked = read_batch_params(order.with_file("file-1", CHAT))
    assert (checked.endpoint, checked.output_expires_after, order.project_id) == ("/v1/embeddings", 7200, "search")
    assert checked.metadata == {
        "team": "search",
        "round": "3",
        "share": "0.5",
        "final": "true",
        "handlers": "s3,webhook",
        "validation": "lenient",
    }


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"endpont": CHAT}, "endpont"),
        ({"endpoint": 3}, "endpoint"),
        ({"handlers": "s3"}, "handlers"),
        ({"metadata": {"a": [1]}}, "metadata"),
        (["endpoint"], "array"),
        ("endpoint", "str"),
    ],
)
def test_a_wrong_order_is_refused_by_name(document: Any, named: str) -> None:
    with pytest.raises(InvalidInput, match=named) as refusal:
        read_order(document)
    assert "completion_window" in refusal.value.message, "what may be written there instead"
