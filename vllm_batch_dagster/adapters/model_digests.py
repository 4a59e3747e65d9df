"""Digests of a model's files: what the manifest says about the model that gave the answers.

A file is read once per process and state (path, size, time of change). A large model has hundreds of gigabytes, so
weights are read in one of three ways: the hub's cache names its files by their sha256, and nothing is read; a file of
up to FULL_BYTES is hashed whole; of a larger one the header (names, types and shapes of the tensors), the size and
SAMPLES evenly spaced blocks are. Two fine-tunes of one model differ in any of them.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from vllm_batch_dagster.adapters.chat_templates import find_template, read_json
from vllm_batch_dagster.adapters.model_facts import find_model_folder
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.provenance import ModelFact, WeightsFact

FULL_BYTES = 1 << 30
SAMPLES = 64
BLOCK_BYTES = 1 << 20
_HEADER_BYTES = 16 << 20
_WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pt")  # the first kind that is there is what an engine loads
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB, _WHOLE, _SAMPLED = "hub", "sha256", "sampled"


def describe_model(model: Model, template: Path | None = None) -> ModelFact:
    """Return what the model's files say; only its name and path when they are not on this machine.

    `template` is a chat template that the engine was told to use instead of the model's own.
    """
    folder = find_model_folder(model)
    if folder is None:
        return ModelFact(model.name, model.path)
    config = read_json(folder / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ModelFact(
        name=model.name,
        path=model.path,
        revision=folder.name if folder.parent.name == "snapshots" else None,
        weights=describe_weights(folder),
        config_sha256=_hash_small(folder / "config.json"),
        tokenizer_sha256=_hash_first(folder, _TOKENIZERS),
        chat_template_sha256=_hash_small(template) if template else _hash_text(find_template(folder)),
        stored_dtype=dtype if isinstance(dtype, str) else None,
        sampling_defaults=read_json(folder / "generation_config.json") or None,
    )


def describe_weights(folder: Path) -> WeightsFact | None:
    """Return the digest of a model's weights; None when there are none, or they cannot be read."""
    files = next((found for kind in _WEIGHTS if (found := sorted(folder.glob(kind)))), [])
    try:
        parts = [(path.name, path.stat().st_size, *_digest(path)) for path in files]
    except OSError:
        return None
    if not parts:
        return None
    whole = hashlib.sha256("".join(f"{name} {size} {digest}\n" for name, size, digest, _method in parts).encode())
    method = _combine([method for *_rest, method in parts])
    return WeightsFact(whole.hexdigest(), method, len(parts), sum(size for _name, size, *_rest in parts))


def _combine(methods: Sequence[str]) -> str:
    """The hub's names are the digests of whole files: only sampling makes a difference to the value."""
    if _SAMPLED in methods:
        return _SAMPLED
    return _HUB if set(methods) == {_HUB} else _WHOLE


def _digest(path: Path) -> tuple[str, str]:
    """Return (digest, method) of one file."""
    blob = path.resolve().name
    if path.is_symlink() and _SHA256.fullmatch(blob):
        return blob, _HUB
    stat = path.stat()
    read = _hash_whole if stat.st_size <= FULL_BYTES else _hash_sampled
    return read(str(path), stat.st_size, stat.st_mtime_ns), _WHOLE if read is _hash_whole else _SAMPLED


@lru_cache(maxsize=1024)
def _hash_whole(path: str, _size: int, _changed: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1024)
def _hash_sampled(path: str, size: int, _changed: int) -> str:
    sha = hashlib.sha256(b"%d" % size)
    with Path(path).open("rb") as file:
        # A safetensors file begins with the length of its header.
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        sha.update(file.read(8 + min(length, _HEADER_BYTES)))
        for number in range(SAMPLES):
            file.seek((size - BLOCK_BYTES) * number // (SAMPLES - 1))
            sha.update(file.read(BLOCK_BYTES))
    return sha.hexdigest()


def _hash_first(folder: Path, names: Sequence[str]) -> str | None:
    return next((digest for name in names if (digest := _hash_small(folder / name))), None)


def _hash_small(path: Path) -> str | None:
    try:
        stat = path.stat()
        return _hash_whole(str(path), stat.st_size, stat.st_mtime_ns)
    except OSError:
        return None


def _hash_text(text: str | None) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest() if text is not None else None
