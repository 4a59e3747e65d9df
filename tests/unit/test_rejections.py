"""What lenient validation refused, behind the entries of the byte index: a format on disk."""

import io

import pytest

from vllm_batch_dagster.core.byteindex import IndexEntry, pack_entry, pack_header
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.rejections import (
    Rejection,
    count_rejections,
    pack_count,
    pack_rejection,
    read_rejections,
)

ENTRIES = pack_header(2) + pack_entry(IndexEntry(0, 9, 1, 2)) + pack_entry(IndexEntry(30, 9, 3, 2))
REFUSED = [Rejection(10, 2, 'quoted "\u00e9"\n', "invalid_url", "Why."), Rejection(50, 9, "b", "x", "\U0001f600")]
PACKED = ENTRIES + pack_count(2) + b"".join(map(pack_rejection, REFUSED))


def test_what_goes_in_comes_out() -> None:
    assert count_rejections(io.BytesIO(PACKED)) == 2
    assert list(read_rejections(io.BytesIO(PACKED))) == REFUSED


def test_an_index_of_strict_mode_has_none() -> None:
    assert count_rejections(io.BytesIO(ENTRIES)) == 0
    assert list(read_rejections(io.BytesIO(ENTRIES))) == []


@pytest.mark.parametrize("cut", [2, 30, len(PACKED) - len(ENTRIES) - 1])
def test_a_trailer_that_is_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(StorageFailure, match="materialize validated_input again"):
        list(read_rejections(io.BytesIO(PACKED[:-cut])))
