"""The journal's format: what was written comes back, and whatever is damaged costs only the records it hit."""

import io

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.errors import CorruptJournal
from vllm_batch_dagster.core.journal import JournalRecord, decode_payload, encode_record, read_placed, read_records


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


@given(st.integers(1, 5), st.data())
def test_a_flipped_bit_costs_one_record(count: int, data: st.DataObject) -> None:
    records = [encode_record(record(number)) for number in range(count)]
    damaged = bytearray(b"".join(records))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    found = lines_of(bytes(damaged))
    # A newline that is flipped away takes the record behind it along.
    assert set(found) <= set(range(count))
    assert len(found) >= count - 2


@pytest.mark.parametrize("hole", [4096, 3 << 20])
def test_zeros_after_a_power_loss_are_passed_over(hole: int) -> None:
    first, second = encode_record(record(0)), encode_record(record(1))
    assert lines_of(first + bytes(hole)) == [0]
    assert lines_of(first + bytes(hole) + b"\n" + second) == [0, 1]


def test_a_published_answer_is_checked_when_it_is_read() -> None:
    data = bytearray(encode_record(record(0)) + encode_record(record(1)))
    placed = list(read_records(io.BytesIO(data)))[1]
    assert read_placed(io.BytesIO(data), placed.offset, placed.length).custom_id == "id-1"
    data[placed.offset + 5] ^= 1
    with pytest.raises(CorruptJournal, match="run the chunk again"):
        read_placed(io.BytesIO(data), placed.offset, placed.length)
