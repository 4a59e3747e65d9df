"""An upload in parts: what it is, what it may hold, and when its parts are a file. Pure; used by stages/uploads.py.

         create
           |
           v      complete
        pending ------------> completed     its parts, in the order that the caller names, are a file
          | |      cancel
          | +---------------> cancelled
          |    one hour
          +-----------------> expired

Limits and words are OpenAI's (contract B). What is not pending takes no part and cannot be completed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from vllm_batch_dagster.core.creation import (
    ID_BYTES,
    Randomness,
    above_maximum,
    below_minimum,
    check_text,
    clean_filename,
    missing_parameter,
    read_expiry,
    read_purpose,
    wrong_type,
)
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.models import DEFAULT_PROJECT

MAX_UPLOAD_BYTES = 8 << 30
MAX_PART_BYTES = 64 << 20
MAX_PARTS = 10_000
UPLOAD_SECONDS = 3_600
MAX_NAME = 512  # of `filename` and `mime_type`, before they are cleaned

NOT_PENDING = "upload_not_pending"
PART_TOO_LARGE = "part_too_large"
TOO_MANY_PARTS = "too_many_parts"
WRONG_TOTAL = "bytes_mismatch"
WRONG_MD5 = "checksum_mismatch"

_MD5 = re.compile(r"[0-9a-f]{32}")


class UploadStatus(StrEnum):
    """OpenAI's four statuses."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload. `bytes` is what its parts must add up to; `expires_after` is for the file, in seconds.

    `file_id` is the file of a completed upload. Of a pending one it is what the newest attempt to complete it writes:
    only that attempt can complete it. `part_ids` and `md5` are those of the completion.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    mime_type: str
    created_at: int
    expires_at: int
    status: UploadStatus = UploadStatus.PENDING
    expires_after: int | None = None
    file_id: str | None = None
    part_ids: tuple[str, ...] = ()
    md5: str | None = None
    project_id: str = DEFAULT_PROJECT

    @property
    def is_pending(self) -> bool:
        return self.status is UploadStatus.PENDING

    def is_overdue(self, now: float) -> bool:
        return self.is_pending and now >= self.expires_at


@dataclass(frozen=True, slots=True)
class UploadPart:
    """A part that is stored durably."""

    id: str
    upload_id: str
    bytes: int
    created_at: int


@dataclass(frozen=True, slots=True)
class PartTotals:
    """What an upload holds by now, used or not."""

    count: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """Checked parameters of a completion. `md5` in lower case."""

    part_ids: tuple[str, ...]
    md5: str | None = None


def new_part_id(randomness: Randomness) -> str:
    return f"part_{randomness(ID_BYTES).hex()}"


def make_upload(
    params: Mapping[str, object], randomness: Randomness, created_at: int, project_id: str = DEFAULT_PROJECT
) -> Upload:
    """Return the new upload. Parameters that OpenAI does not know are ignored. Raises InvalidInput."""
    filename, mime_type = read_text(params, "filename"), read_text(params, "mime_type")
    return Upload(
        id=f"upload_{randomness(ID_BYTES).hex()}",
        filename=clean_filename(filename),
        purpose=read_purpose(read_text(params, "purpose")),
        bytes=_read_size(params),
        mime_type=mime_type,
        created_at=created_at,
        expires_at=created_at + UPLOAD_SECONDS,
        expires_after=read_expiry(params.get("expires_after"), "expires_after"),
        project_id=project_id,
    )


def read_completion(params: Mapping[str, object]) -> Completion:
    """Check the parameters of a completion. Raises InvalidInput."""
    if "part_ids" not in params:
        raise missing_parameter("part_ids")
    part_ids = params["part_ids"]
    if not isinstance(part_ids, list):
        raise wrong_type("part_ids", "an array", part_ids)
    for place, part_id in enumerate(part_ids):
        if not isinstance(part_id, str):
            raise wrong_type(f"part_ids[{place}]", "a string", part_id)
    return Completion(tuple(part_ids), _read_md5(params.get("md5")))


def read_text(params: Mapping[str, object], name: str) -> str:
    """Return a required string. Raises InvalidInput."""
    if name not in params:
        raise missing_parameter(name)
    value = params[name]
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    check_text(name, value, MAX_NAME)
    return value


def check_pending(upload: Upload) -> None:
    """Raises InvalidInput when the upload is closed."""
    if not upload.is_pending:
        raise InvalidInput(
            f"Upload {upload.id} is {upload.status.value}: it takes no parts and cannot be completed or cancelled. "
            "Create a new upload.",
            code=NOT_PENDING,
        )


def check_room(upload: Upload, held: PartTotals) -> None:
    """Raises InvalidInput when the upload holds so much already that it cannot be in good faith.

    A part whose answer was lost is sent again and held twice, so there is room for everything once more.
    """
    if held.count >= MAX_PARTS or held.bytes > 2 * upload.bytes + MAX_PART_BYTES:
        raise InvalidInput(
            f"Upload {upload.id} holds {held.count} parts of {held.bytes} bytes together, for a file of "
            f"{upload.bytes} bytes. It takes no more: complete it, or cancel it and begin again with larger parts.",
            param="data",
            code=TOO_MANY_PARTS,
        )


def part_too_large() -> InvalidInput:
    return InvalidInput(
        f"The part is larger than {MAX_PART_BYTES} bytes. Send the file in smaller parts.",
        param="data",
        code=PART_TOO_LARGE,
    )


def order_parts(upload: Upload, parts: Iterable[UploadPart], part_ids: tuple[str, ...]) -> tuple[UploadPart, ...]:
    """Return the parts in the order of the file. Raises InvalidInput unless they make up exactly the file."""
    known = {part.id: part for part in parts}
    for place, part_id in enumerate(part_ids):
        if part_id not in known:
            raise _bad_part(place, part_id, f"upload {upload.id} has no part with this id")
    if len(set(part_ids)) < len(part_ids):
        place = next(place for place, part_id in enumerate(part_ids) if part_id in part_ids[:place])
        raise _bad_part(place, part_ids[place], "it is in the list already")
    ordered = tuple(known[part_id] for part_id in part_ids)
    if (total := sum(part.bytes for part in ordered)) != upload.bytes:
        raise InvalidInput(
            f"The parts have {total} bytes together, but the upload was created for {upload.bytes} bytes.",
            param="part_ids",
            code=WRONG_TOTAL,
        )
    return ordered


def check_md5(wanted: str | None, found: str | None) -> None:
    """Raises InvalidInput when the caller expects other contents."""
    if wanted is not None and wanted != found:
        raise InvalidInput(
            f"The parts in this order have the MD5 checksum {found}, but {wanted} was expected.",
            param="md5",
            code=WRONG_MD5,
        )


def _bad_part(place: int, part_id: str, reason: str) -> InvalidInput:
    return InvalidInput(
        f"Invalid 'part_ids[{place}]': '{part_id[:100]}': {reason}.", param=f"part_ids[{place}]", code="invalid_value"
    )


def _read_size(params: Mapping[str, object]) -> int:
    if "bytes" not in params:
        raise missing_parameter("bytes")
    size = params["bytes"]
    if not isinstance(size, int) or isinstance(size, bool):
        raise wrong_type("bytes", "an integer", size)
    if size < 0:
        raise below_minimum("bytes", size, 0)
    if size > MAX_UPLOAD_BYTES:
        raise above_maximum("bytes", size, MAX_UPLOAD_BYTES)
    return size


def _read_md5(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise wrong_type("md5", "a string", value)
    if not _MD5.fullmatch(value.lower()):
        raise InvalidInput("Invalid 'md5': expected 32 hexadecimal digits.", param="md5", code="invalid_value")
    return value.lower()
