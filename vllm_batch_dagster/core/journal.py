"""The journal's format: one record per final answer of a line, appended by one attempt at a chunk.

    <payload length, 8 hex> <crc32 of payload, 8 hex> <payload: one JSON object>\\n

The payload ends with the engine's body as it came, so that a merge can splice it into the output line. A record
that is damaged (cut off by a death, zeros after a power loss, a flipped bit) is passed over up to the next newline,
which no payload holds: its line counts as unanswered and is sent again.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from vllm_batch_dagster.core.errors import CorruptJournal

_HEAD_BYTES = 18
_PIECE_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 30


class JournalRecord(msgspec.Struct, frozen=True):
    """A final answer. `line` is 0-based in the byte index; `seconds` from dispatch to the last byte; `tries` sends."""

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

    @property
    def end(self) -> int:
        """Return the offset behind the record, where the next one begins."""
        return self.offset + self.length + 1


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


def read_records(journal: BinaryIO, start: int = 0) -> Iterator[PlacedRecord]:
    """Yield the intact records from byte `start` (the end of a record), passing over what is damaged. `journal` is
    seekable."""
    offset = start
    while True:
        payload = read_payload(journal, offset)
        if payload is not None:
            yield PlacedRecord(offset + _HEAD_BYTES, len(payload), decode_payload(payload))
            offset += _HEAD_BYTES + len(payload) + 1
        elif (found := _next_record(journal, offset)) is not None:
            offset = found
        else:
            return


def read_payload(journal: BinaryIO, offset: int) -> bytes | None:
    """Return the payload of the record that begins at byte `offset`, None when there is no intact one."""
    journal.seek(offset)
    head = journal.read(_HEAD_BYTES)
    if len(head) < _HEAD_BYTES:
        return None
    try:
        length, checksum = int(head[:8], 16), int(head[9:17], 16)
    except ValueError:
        return None
    if not 0 < length <= MAX_PAYLOAD_BYTES:
        return None
    payload = journal.read(length)
    return payload if zlib.crc32(payload) == checksum and journal.read(1) == b"\n" else None


def read_placed(journal: BinaryIO, offset: int) -> JournalRecord:
    """Return the record whose payload lies at `offset`, as a PlacedRecord says. Raises CorruptJournal."""
    payload = read_payload(journal, offset - _HEAD_BYTES)
    if payload is None:
        raise CorruptJournal(f"the journal record at byte {offset} fails its checksum; run the chunk again")
    return decode_payload(payload)


def _next_record(journal: BinaryIO, offset: int) -> int | None:
    """Return where the next record may begin: behind the next newline; None at the end."""
    journal.seek(offset)
    while piece := journal.readline(_PIECE_BYTES):
        offset += len(piece)
        if piece.endswith(b"\n"):
            return offset
    return None
