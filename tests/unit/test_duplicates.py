"""Repeated ids are found exactly, whatever the size of the table."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.duplicates import DuplicateFilter, repeated_hashes


@given(st.lists(st.integers(0, 300), max_size=400))
def test_every_repeat_is_found_and_nothing_else(hashes: list[int]) -> None:
    table = DuplicateFilter(len(hashes) * 64)
    for value in hashes:
        table.add(value)
    expected = {value for position, value in enumerate(hashes) if value in hashes[:position]}
    assert repeated_hashes(hashes, table.suspects) == expected


@given(st.sets(st.integers(0, 2**64 - 1), max_size=500))
def test_a_collision_in_the_table_is_only_a_suspicion(hashes: set[int]) -> None:
    table = DuplicateFilter(0)
    crowded = [value & ~0xFFFF for value in hashes]  # all fall on few bits of the smallest table
    unique = list(dict.fromkeys(crowded))
    for value in unique:
        table.add(value)
    assert repeated_hashes(unique, table.suspects) == set()
