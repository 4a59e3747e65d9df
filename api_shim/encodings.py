"""Content encodings of downloads: Accept-Encoding in, a compressor or none out. Called by api_shim/downloads.py."""

import zlib
from collections.abc import Callable
from typing import Protocol

from backports.zstd import ZstdCompressor

# Below, the headers weigh as much as what is saved.
MIN_ENCODED_BYTES = 1024
# The fastest level of each: the next ones take half as long again and save a tenth.
_LEVEL = 1
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


class Compressor(Protocol):
    """Pushes bytes through; `flush` ends the stream."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "zstd": lambda: ZstdCompressor(level=_LEVEL),
    "gzip": lambda: zlib.compressobj(_LEVEL, wbits=_GZIP_WINDOW),
}


def choose_encoding(accepted: str | None, size: int) -> str | None:
    """Return the encoding for a file of `size` bytes, None for the bytes as they are.

    zstd when it is listed. gzip costs a core at 90 MB/s and every HTTP library lists it unasked, beside others: it is
    taken only when nothing else is listed, or when the bytes as they are were refused.
    """
    if size < MIN_ENCODED_BYTES:
        return None
    weights = read_weights(accepted or "")
    plain = weights.pop("identity", None)
    refused = plain == 0.0 or (plain is None and weights.get("*") == 0.0)
    listed = {coding for coding, weight in weights.items() if weight > (plain or 0.0) and coding != "*"}
    if "zstd" in listed:
        return "zstd"
    return "gzip" if listed == {"gzip"} or (refused and "gzip" in listed) else None


def read_weights(accepted: str) -> dict[str, float]:
    """Return what Accept-Encoding says of each coding, in lower case. 0 means: never."""
    weights: dict[str, float] = {}
    for item in accepted.split(","):
        coding, _, parameter = item.partition(";")
        name, _, text = parameter.strip().partition("=")
        if coding.strip():
            weights[coding.strip().lower()] = _read_weight(text) if name.strip().lower() == "q" else 1.0
    return weights


def _read_weight(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0
