"""The byte index as a file: its layout is a format on disk, and a damaged one is refused with a mend."""

import io
import struct

import pytest

from vllm_batch_dagster.core.byteindex import (
    IndexEntry,
    estimate_tokens,
    pack_entry,
    pack_header,
    read_count,
    read_entries,
)
from vllm_batch_dagster.core.errors import StorageFailure

ENTRIES = [IndexEntry(number * 100, 99, 2**64 - 1 - number, 25) for number in range(600)]
PACKED = pack_header(len(ENTRIES)) + b"".join(map(pack_entry, ENTRIES))


def test_the_layout_does_not_change() -> None:
    entry = IndexEntry(offset=2**40 + 1, length=77, id_hash=2**64 - 2, tokens=19)
    assert pack_header(1_000_000) == b"VBINDEX1" + struct.pack("<Q", 1_000_000)
    assert pack_entry(entry) == struct.pack("<QIQI", 2**40 + 1, 77, 2**64 - 2, 19)
    assert len(pack_entry(entry)) == 24
    assert list(read_entries(io.BytesIO(pack_header(1) + pack_entry(entry)), 0, 1)) == [entry]


@pytest.mark.parametrize("damaged", [b"", PACKED[:15], b"VBRESLT1" + PACKED[8:], bytes(64)])
def test_what_is_no_index_is_refused(damaged: bytes) -> None:
    with pytest.raises(StorageFailure, match="materialize validated_input again"):
        read_count(io.BytesIO(damaged))


@pytest.mark.parametrize(("first", "count"), [(0, 600), (599, 1), (100, 500)])
def test_an_index_that_is_cut_short_is_refused(first: int, count: int) -> None:
    with pytest.raises(StorageFailure, match="cut short"):
        list(read_entries(io.BytesIO(PACKED[:-1]), first, count))


def test_what_lies_before_the_cut_can_be_read() -> None:
    assert list(read_entries(io.BytesIO(PACKED[:-1]), 0, 599)) == ENTRIES[:599]


def test_reading_starts_anywhere_whatever_was_read_before() -> None:
    index = io.BytesIO(PACKED)
    assert read_count(index) == 600
    assert list(read_entries(index, 513, 2)) == ENTRIES[513:515]
    assert list(read_entries(index, 0, 1)) == ENTRIES[:1]
    assert list(read_entries(index, 600, 0)) == []
    assert read_count(index) == 600


def test_the_token_estimate_fits_its_field() -> None:
    assert estimate_tokens(b"") == 0
    assert estimate_tokens(b"x" * 400) == 100


def test_the_estimate_of_a_body_that_no_memory_holds() -> None:
    class Vast(bytes):
        def __len__(self) -> int:
            return 2**40

    pack_entry(IndexEntry(0, 0, 0, estimate_tokens(Vast())))
