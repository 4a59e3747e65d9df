"""The journal's format: one record per final answer of a line, appended by one attempt at a chunk.

    <payload length, 8 hex> <crc32 of payload, 8 hex> <payload: one JSON object>\\n

The payload ends with the engine's body as it came, so that a merge can splice it into the output line. A record
that is damaged (cut off by a death, zeros after a power loss, a flipped bit) is passed over up to the next newline,
which no payload holds: its line counts as unanswered and is sent again. There is one way to write a record, so a bit
that flips in the head shows too, and no more than one record is in memory, whatever length a damaged head tells.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from vllm_batch_dagster.core.errors import CorruptJournal

HEAD_BYTES = 18
_PIECE_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 30
_MOST_BYTES = 1 << 43  # a damaged offset may be beyond what a file can have


# `repair` of a record. Those of a line that is asked again do not answer it; a line ends with one of the others.
LENGTH_FLAW, SCHEMA_FLAW, FAILED_REPAIR = "length", "schema", "failed"
REPAIRED, UNREPAIRED = "repaired", "unrepaired"
_TRIED = frozenset({LENGTH_FLAW, SCHEMA_FLAW, FAILED_REPAIR})

NO_RESPONSE = 0
"""The `status` of a line that got no answer for good: its `body` is the error, `code` and `message`."""


class JournalRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer. `line` is 0-based in the byte index; `seconds` from dispatch to the last byte; `tries` sends.

    `round` and `repair` are there for lines that were asked again (stages/repairing.py): how often before this answer,
    and why it was not accepted, or how it ended. Two records of one round hold the same answer.
    """

    line: int
    custom_id: str
    ok: bool
    status: int
    request_id: str
    seconds: float
    tries: int
    body: msgspec.Raw
    round: int = 0
    repair: str = ""

    @property
    def is_final(self) -> bool:
        """True for the answer that was accepted, which ends the line; the first one in the journals counts."""
        return self.repair not in _TRIED


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
    return _pack_head(payload) + payload + b"\n"


def _pack_head(payload: bytes) -> bytes:
    return b"%08x %08x " % (len(payload), zlib.crc32(payload))


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
            yield PlacedRecord(offset + HEAD_BYTES, len(payload), decode_payload(payload))
            offset += HEAD_BYTES + len(payload) + 1
        elif (found := _next_record(journal, offset)) is not None:
            offset = found
        else:
            return


def read_payload(journal: BinaryIO, offset: int) -> bytes | None:
    """Return the payload of the record that begins at byte `offset`, None when there is no intact one."""
    journal.seek(offset)
    head = journal.read(HEAD_BYTES)
    if len(head) < HEAD_BYTES:
        return None
    try:
        length = int(head[:8], 16)
    except ValueError:
        return None
    if not 0 < length <= MAX_PAYLOAD_BYTES:
        return None
    # At most to the next newline: a wrong length must not draw half of the journal into memory.
    line = journal.readline(length + 1)
    payload = line[:-1]
    is_whole = len(line) == length + 1 and line.endswith(b"\n") and head == _pack_head(payload)
    return payload if is_whole else None


def read_placed(journal: BinaryIO, offset: int, length: int) -> JournalRecord:
    """Return the record whose payload lies at `offset`, as a PlacedRecord says. Raises CorruptJournal."""
    is_place = HEAD_BYTES <= offset < _MOST_BYTES
    payload = read_payload(journal, offset - HEAD_BYTES) if is_place else None
    if payload is None or len(payload) != length:
        raise CorruptJournal(f"the journal record at byte {offset} fails its checksum; run the chunk again")
    return decode_payload(payload)


def damaged_places(journal: BinaryIO) -> Iterator[tuple[int, bool]]:
    """Yield (offset, is_tail) of the stretches without an intact record. A tail is the last one and has no newline: so
    looks what a death has torn, or what is being written just now; damage to a whole record does not."""
    expected = 0
    for placed in read_records(journal):
        if placed.offset - HEAD_BYTES != expected:
            yield expected, False
        expected = placed.end
    journal.seek(expected)
    if journal.read(1):
        yield expected, _next_record(journal, expected) is None


def _next_record(journal: BinaryIO, offset: int) -> int | None:
    """Return where the next record may begin: behind the next newline; None at the end."""
    journal.seek(offset)
    while piece := journal.readline(_PIECE_BYTES):
        offset += len(piece)
        if piece.endswith(b"\n"):
            return offset
    return None
