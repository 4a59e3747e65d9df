"""The journal's format: one record per final answer of a line, appended by one attempt at a chunk.

    <payload length, 8 hex> <crc32 of payload, 8 hex> <payload: one JSON object>\\n

The payload ends with the engine's body as it came, so that a merge can splice it into the output line. A record
that is cut off at the end of the file is a torn tail: the line was never acknowledged and is sent again.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from vllm_batch_dagster.core.errors import CorruptJournal

_HEAD_BYTES = 18


class JournalRecord(msgspec.Struct, frozen=True):
    """A final answer. `line` is 0-based in the batch; `seconds` from dispatch to the last byte; `tries` sends."""

    line: int
    custom_id: str
    ok: bool
    status: int
    request_id: str
    seconds: float
    tries: int
    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class PlacedRecord:
    """A record and where its payload lies in the journal."""

    offset: int
    length: int
    record: JournalRecord


_decoder = msgspec.json.Decoder(JournalRecord)


def encode_record(record: JournalRecord) -> bytes:
    payload = msgspec.json.encode(record)
    return b"%08x %08x %b\n" % (len(payload), zlib.crc32(payload), payload)


def decode_payload(payload: bytes) -> JournalRecord:
    """Raises CorruptJournal when the payload is not a record."""
    try:
        return _decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise CorruptJournal(f"a journal record cannot be read: {error}") from error


def read_records(journal: BinaryIO) -> Iterator[PlacedRecord]:
    """Yield the records from the start. Raises CorruptJournal for a bad record that is not the torn tail."""
    offset = 0
    while head := journal.read(_HEAD_BYTES):
        length, checksum = _parse_head(head)
        payload = journal.read(length) if length is not None else b""
        newline = journal.read(1)
        intact = length == len(payload) and newline == b"\n" and zlib.crc32(payload) == checksum
        if not intact:
            if (length is not None and newline == b"") or not journal.read(1):
                return
            raise CorruptJournal(f"journal record at byte {offset} fails its checksum")
        yield PlacedRecord(offset + _HEAD_BYTES, len(payload), decode_payload(payload))
        offset += _HEAD_BYTES + len(payload) + 1


def _parse_head(head: bytes) -> tuple[int | None, int]:
    try:
        return int(head[:8], 16), int(head[9:17], 16)
    except ValueError:
        return None, 0
