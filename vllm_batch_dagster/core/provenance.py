"""Where answers came from: the engine that gave them and the model in it, as far as it is known.

Noted while an attempt runs (stages/origins.py), kept in the manifest of a batch. What nobody told us is None, and its
name stands in `unknown`: nothing here is a guess.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from vllm_batch_dagster.core.models import Model

OWN, EXTERNAL = "own", "external"


class WeightsFact(msgspec.Struct, frozen=True):
    """`digest` is a sha256 over name, size and digest of each weights file, in the order of names. `method` says how
    files were read: "sha256" (every byte), "hub" (the hub's cache names its files by sha256), or "sampled"."""

    digest: str
    method: str
    files: int
    bytes: int


class ModelFact(msgspec.Struct, frozen=True):
    """The model's files. Digests are sha256 in hex; `sampling_defaults` is generation_config.json, which vLLM applies
    to requests that do not say otherwise; `stored_dtype` is what config.json says of the weights."""

    name: str
    path: str | None = None
    revision: str | None = None
    weights: WeightsFact | None = None
    config_sha256: str | None = None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    stored_dtype: str | None = None
    sampling_defaults: Mapping[str, Any] | None = None


class EngineFact(msgspec.Struct, frozen=True):
    """The server. `kind`: "own" (started by us) or "external" (ENGINE_URL). `dtype` is as asked for: "auto" lets the
    engine choose. `started_at` in unix seconds."""

    kind: str
    versions: tuple[str, ...] = ()
    arguments: tuple[str, ...] | None = None
    device: str | None = None
    dtype: str | None = None
    started_at: float | None = None


class Origin(msgspec.Struct, frozen=True):
    """One engine with one model in it. `unknown` names the fields that nobody could tell."""

    engine: EngineFact
    model: ModelFact
    unknown: tuple[str, ...] = ()


class Provenance(Protocol):
    """Tells what answers a model's requests right now."""

    def describe(self, model: Model) -> Origin:
        """May read the model's files and ask the engine for its version; takes seconds the first time. Raises
        nothing for what cannot be found out."""


def make_origin(engine: EngineFact, model: ModelFact) -> Origin:
    """Return the origin with the names of what is not known."""
    gaps = [*_gaps("engine", engine), *_gaps("model", model)]
    return Origin(engine, model, tuple(gaps))


def _gaps(part: str, fact: msgspec.Struct) -> list[str]:
    return [f"{part}.{name}" for name in fact.__struct_fields__ if getattr(fact, name) in (None, ())]
