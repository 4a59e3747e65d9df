"""Keys as strings and records: entropy, hash, header, what a refused one shows."""

import hashlib
import re
import secrets

import pytest

from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.keys import (
    SECRET_BYTES,
    hash_secret,
    is_same_hash,
    make_key,
    mask_secret,
    new_secret,
    read_bearer,
    read_project,
)


def test_a_key_carries_256_random_bits_and_fits_a_header() -> None:
    asked: list[int] = []

    def randomness(count: int) -> bytes:
        asked.append(count)
        return b"\xff" * count

    assert re.fullmatch(r"vb-[\w-]{43}", new_secret(randomness), re.ASCII)
    assert asked == [SECRET_BYTES] == [32]
    assert new_secret(secrets.token_bytes) != new_secret(secrets.token_bytes)


def test_no_bit_of_the_randomness_is_lost() -> None:
    last = [new_secret(lambda count, end=end: bytes(count - 1) + bytes([end])) for end in range(256)]
    assert len(set(last)) == 256


def test_what_is_stored_does_not_hold_the_key() -> None:
    secret = new_secret(secrets.token_bytes)
    key = make_key(secret, "team-a", "ci", secrets.token_bytes, 1_000)

    assert key.hash == hashlib.sha256(secret.encode()).hexdigest() == hash_secret(secret)
    assert secret not in repr(key)
    assert secret.removeprefix("vb-")[:8] not in repr(key)
    assert key.id.startswith("key_")
    assert (key.project_id, key.label, key.created_at, key.is_live) == ("team-a", "ci", 1_000, True)


def test_hashes_are_the_same_or_not() -> None:
    assert is_same_hash(hash_secret("vb-a"), hash_secret("vb-a"))
    assert not is_same_hash(hash_secret("vb-a"), hash_secret("vb-b"))


@pytest.mark.parametrize("header", ["Bearer vb-x_1", "bearer vb-x_1", "BEARER  vb-x_1 "])
def test_a_bearer_header_is_read(header: str) -> None:
    assert read_bearer(header) == "vb-x_1"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "vb-x", "Basic vb-x", "Bearer a b", "Bearer\tx", "Bearervb-x", "Bearer w\xf6rt"]
)
def test_another_header_is_none(header: str) -> None:
    assert read_bearer(header) is None


@pytest.mark.parametrize(
    ("secret", "shown"),
    [("vb-abcdefghijklmnopqrstuvwxyz", "vb-abc********"), ("password", "pa********"), ("abc", "********")],
)
def test_a_refused_key_shows_its_beginning_only(secret: str, shown: str) -> None:
    assert mask_secret(secret) == shown


@pytest.mark.parametrize("name", ["a", "default", "team-a", "team_1", "0" * 64])
def test_names_of_projects(name: str) -> None:
    assert read_project(name) == name


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a b", "a/b", "ä", "a\n", "0" * 65, "*"])
def test_names_that_no_project_can_have(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_project(name)
    assert caught.value.param == "project"


@pytest.mark.parametrize("label", ["x" * 101, "a\nb", "\x1b[31m"])
def test_a_label_cannot_harm_a_terminal(label: str) -> None:
    with pytest.raises(InvalidInput):
        make_key("vb-x", "a", label, secrets.token_bytes, 1)
