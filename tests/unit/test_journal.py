"""The journal's format: what was written comes back, a torn tail is dropped, a damaged middle is an error."""

import io

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.errors import CorruptJournal
from vllm_batch_dagster.core.journal import JournalRecord, decode_payload, encode_record, read_records


def record(line: int, text: str = "x") -> JournalRecord:
    body = msgspec.Raw(msgspec.json.encode({"text": text}))
    return JournalRecord(line, f"id-{line}", True, 200, f"req-{line}", 0.25, 1, body)


def lines_of(data: bytes) -> list[int]:
    return [placed.record.line for placed in read_records(io.BytesIO(data))]


@given(st.lists(st.text(max_size=50), max_size=20))
def test_records_come_back_and_their_place_is_right(texts: list[str]) -> None:
    data = b"".join(encode_record(record(number, text)) for number, text in enumerate(texts))
    placed = list(read_records(io.BytesIO(data)))
    assert [item.record.line for item in placed] == list(range(len(texts)))
    for item, text in zip(placed, texts, strict=True):
        again = decode_payload(data[item.offset : item.offset + item.length])
        assert msgspec.json.decode(again.body) == {"text": text}


@given(st.integers(1, 3), st.data())
def test_any_torn_tail_keeps_the_records_before_it(count: int, data: st.DataObject) -> None:
    whole = b"".join(encode_record(record(number)) for number in range(count))
    tail = encode_record(record(count))
    cut = data.draw(st.integers(0, len(tail) - 1))
    assert lines_of(whole + tail[:cut]) == list(range(count))


def test_a_flipped_byte_in_the_middle_is_corruption() -> None:
    first, second = encode_record(record(0)), encode_record(record(1))
    damaged = bytearray(first + second)
    damaged[30] ^= 1
    with pytest.raises(CorruptJournal, match="byte 0"):
        lines_of(bytes(damaged))


def test_a_flipped_byte_in_the_last_record_is_a_torn_tail() -> None:
    data = bytearray(encode_record(record(0)) + encode_record(record(1)))
    data[-5] ^= 1
    assert lines_of(bytes(data)) == [0]
