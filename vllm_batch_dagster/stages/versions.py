"""Folders that are written whole and never changed: `<data set>/version=<digest>`, and `latest`, a link to the newest.

The digest is that of the contents, so the same contents are the same version: writing them again changes nothing.
Called by the stages that make training sets and gold sets.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from vllm_batch_dagster.stages.publication import make_folder, publish, sync_folder

T = TypeVar("T")

LATEST, MANIFEST = "latest", "manifest.json"
_DIGEST = 12
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Version:
    """`id` is the digest. `is_new` False: these contents were there. `bytes` of all files."""

    id: str
    path: Path
    bytes: int
    is_new: bool


def write_version(folder: Path, write: Callable[[Path], T]) -> tuple[Version, T]:
    """Let `write` fill an empty folder, and publish it as a version of the data set `folder`, the latest one."""
    fresh = make_folder(folder) / "version.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    made = write(fresh)
    names = sorted(path.name for path in fresh.iterdir())
    digest, size = _digest([fresh / name for name in names])
    target = folder / f"version={digest}"
    is_new = not target.exists()
    if is_new:
        for name in names:
            sync_folder(fresh / name)
        sync_folder(fresh)
        fresh.rename(target)
    else:
        shutil.rmtree(fresh)
    _point(folder / LATEST, target.name)
    return Version(digest, target, size, is_new), made


def latest_version(folder: Path) -> Path | None:
    """Return the folder of the latest version, None when there is none."""
    link = folder / LATEST
    return link.resolve() if link.is_dir() else None


def version_path(folder: Path, version: str) -> Path:
    return folder / f"version={version}"


def version_id(path: Path) -> str:
    return path.name.partition("=")[2]


def write_manifest(folder: Path, content: Mapping[str, object]) -> None:
    """Write what a version holds, for people and programs that find it later."""
    with publish(folder / MANIFEST) as file:
        file.write(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def _digest(paths: list[Path]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        for block in _blocks(path):
            digest.update(block)
            size += len(block)
    return digest.hexdigest()[:_DIGEST], size


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _point(link: Path, target: str) -> None:
    """Let the link point to a folder beside it, at every moment to one or the other."""
    fresh = link.with_name(f".{link.name}.new")
    with suppress(FileNotFoundError):
        fresh.unlink()
    fresh.symlink_to(target, target_is_directory=True)
    fresh.replace(link)
    sync_folder(link.parent)
