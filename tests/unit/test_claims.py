"""What makes two calls the same call."""

from dataclasses import replace

import pytest

from vllm_batch_dagster.core.claims import BATCHES, FILES, ClaimKey, claim_batch, claim_file, read_claim_key
from vllm_batch_dagster.core.creation import FileFacts
from vllm_batch_dagster.core.errors import InvalidInput

FACTS = FileFacts("in.jsonl", "batch", 3600, "a")
FILE_KEY = ClaimKey("a", FILES, "k")
BATCH_KEY = ClaimKey("a", BATCHES, "k")


@pytest.mark.parametrize(
    ("facts", "sha256"),
    [
        (FACTS, "other"),
        (replace(FACTS, filename="other.jsonl"), "abc"),
        (replace(FACTS, purpose="evals"), "abc"),
        (replace(FACTS, expires_after=None), "abc"),
    ],
)
def test_content_name_purpose_and_expiry_make_a_file(facts: FileFacts, sha256: str) -> None:
    assert claim_file(FILE_KEY, facts, sha256) != claim_file(FILE_KEY, FACTS, "abc")


def test_the_same_file_is_the_same_claim() -> None:
    sent_elsewhere = replace(FACTS, filename="some/folder/in.jsonl")
    assert claim_file(FILE_KEY, sent_elsewhere, "abc") == claim_file(FILE_KEY, FACTS, "abc")


def test_a_batch_is_its_json_in_any_order() -> None:
    one = claim_batch(BATCH_KEY, {"endpoint": "/v1/x", "metadata": {"a": "1", "b": "\ud800"}})
    assert one == claim_batch(BATCH_KEY, {"metadata": {"b": "\ud800", "a": "1"}, "endpoint": "/v1/x"})
    assert one != claim_batch(BATCH_KEY, {"endpoint": "/v1/x", "metadata": {"a": "1", "b": "2"}})
    assert one != claim_batch(BATCH_KEY, {"endpoint": "/v1/x"})


@pytest.mark.parametrize("value", ["x", "f81d4fae-7dec-11d0", "a b", "~" * 255])
def test_keys(value: str) -> None:
    assert read_claim_key(value) == value


@pytest.mark.parametrize("value", ["", "x" * 256, "a\tb", "ä", "a\n", "\x7f"])
def test_what_no_key_can_be(value: str) -> None:
    with pytest.raises(InvalidInput, match="Idempotency-Key"):
        read_claim_key(value)
