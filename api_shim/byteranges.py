"""Which bytes a download asks for: Range, If-Range, If-None-Match in, a decision out (RFC 9110, sections 13 and 14).

Pure. Called by api_shim/downloads.py, and by whatever else can be resumed.
"""

import re
from dataclasses import dataclass

# 19 digits hold every size that a file can have; what is longer is no range of ours.
_ONE_RANGE = re.compile(r"\s*bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `start` up to, not including, `end`."""

    start: int
    end: int

    def describe(self, size: int) -> str:
        """The Content-Range header for a file of `size` bytes."""
        return f"bytes {self.start}-{self.end - 1}/{size}"


class Unsatisfiable(Exception):
    """No byte of the file is in the range that was asked for."""


def read_range(header: str | None, size: int) -> ByteRange | None:
    """Return the range that `header` asks for, of a file of `size` bytes; None stands for the whole file.

    Several ranges, other units and what cannot be read mean the whole file, as RFC 9110 allows. Raises Unsatisfiable.
    """
    found = _ONE_RANGE.fullmatch(header or "")
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise Unsatisfiable
    return ByteRange(start, end)


def may_resume(if_range: str | None, etag: str) -> bool:
    """False when the sender wants a part of other contents than these: it must get the whole file."""
    return if_range is None or if_range.strip() == etag


def is_known(if_none_match: str | None, etag: str) -> bool:
    """True when the sender has these contents already."""
    known = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return etag in known or known == ["*"]
