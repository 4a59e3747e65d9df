"""Digests of files of any size, a block at a time. Used by the manifest and by its verification."""

import hashlib
import zlib
from collections.abc import Callable
from typing import BinaryIO

from vllm_batch_dagster.core.manifest import BLOCK_BYTES, FileDigest

# How many bytes were read since the last call.
Progress = Callable[[int], None]


def ignore_progress(_read: int) -> None:
    """For callers that show nothing."""


def digest_file(
    name: str,
    file: BinaryIO,
    *,
    length: int | None = None,
    lines: int | None = None,
    with_blocks: bool = False,
    progress: Progress = ignore_progress,
) -> FileDigest:
    """Return the digest of the first `length` bytes (None: all) of a file that stands at its beginning."""
    sha, size, blocks = hashlib.sha256(), 0, []
    while block := file.read(BLOCK_BYTES if length is None else min(BLOCK_BYTES, length - size)):
        sha.update(block)
        size += len(block)
        if with_blocks:
            blocks.append(f"{zlib.crc32(block):08x}")
        progress(len(block))
    return FileDigest(name, size, sha.hexdigest(), lines, "".join(blocks))


def differing_blocks(then: FileDigest, now: FileDigest) -> list[int]:
    """Return the numbers of the blocks in which two digests of a file differ, as far as both have them."""
    width = 8
    count = max(len(then.blocks), len(now.blocks)) // width
    spans = [slice(number * width, (number + 1) * width) for number in range(count)]
    return [number for number, span in enumerate(spans) if then.blocks[span] != now.blocks[span]]
