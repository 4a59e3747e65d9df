"""The keys of the batch store: on every implementation the same."""

import pytest

from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.keys import Key, hash_secret
from vllm_batch_dagster.core.ports import BatchStore

NOW = 1_700_000_000


def a_key(name: str = "a", project_id: str = "team-a") -> Key:
    return Key(f"key_{name}", project_id, hash_secret(name), "für CI", NOW)


def test_a_key_comes_back_as_it_was(store: BatchStore) -> None:
    store.keys.add(a_key())
    assert list(store.keys.list()) == [a_key()]


def test_keys_are_listed_oldest_first(store: BatchStore) -> None:
    for name in ("c", "a", "b"):
        store.keys.add(a_key(name))
    assert [key.id for key in store.keys.list()] == ["key_c", "key_a", "key_b"]


def test_a_new_store_has_none(store: BatchStore) -> None:
    assert list(store.keys.list()) == []


def test_an_id_or_a_hash_is_taken_once(store: BatchStore) -> None:
    store.keys.add(a_key())
    with pytest.raises(StateConflict):
        store.keys.add(Key("key_a", "team-b", hash_secret("other"), "", NOW))
    with pytest.raises(StateConflict):
        store.keys.add(Key("key_b", "team-b", hash_secret("a"), "", NOW))
    assert list(store.keys.list()) == [a_key()]


def test_a_revoked_key_stays_and_keeps_its_time(store: BatchStore) -> None:
    store.keys.add(a_key("a"))
    store.keys.add(a_key("b"))

    revoked = store.keys.revoke("key_a", NOW + 5)
    assert (revoked.revoked_at, revoked.is_live) == (NOW + 5, False)
    assert store.keys.revoke("key_a", NOW + 9) == revoked
    assert [key.is_live for key in store.keys.list()] == [False, True]


def test_an_unknown_key_cannot_be_revoked(store: BatchStore) -> None:
    with pytest.raises(NotFound) as caught:
        store.keys.revoke("key_x", NOW)
    assert (caught.value.kind, caught.value.object_id) == ("key", "key_x")


def test_the_use_of_a_key_is_noted(store: BatchStore) -> None:
    store.keys.add(a_key("a"))
    store.keys.add(a_key("b"))
    store.keys.touch("key_a", NOW + 7)
    store.keys.touch("key_x", NOW + 7)
    assert [key.last_used_at for key in store.keys.list()] == [NOW + 7, None]
