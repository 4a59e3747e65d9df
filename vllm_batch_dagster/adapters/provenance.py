"""What answers a model's requests at this moment: our own engine by its record, or somebody else's by what it says.

In: a catalogue entry. Out: an Origin for the manifest. Of servers behind ENGINE_URL only the version and the name under
which they serve are known: which files they loaded, with which arguments, nobody tells us.
"""

from collections.abc import Sequence
from functools import cached_property
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec

from vllm_batch_dagster.adapters.catalog import fetch_json
from vllm_batch_dagster.adapters.engine.config import resolve_device
from vllm_batch_dagster.adapters.engine.folder import EngineFolder
from vllm_batch_dagster.adapters.engine.remote import split_urls
from vllm_batch_dagster.adapters.model_digests import describe_model
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.provenance import EXTERNAL, OWN, EngineFact, ModelFact, Origin, make_origin

ASK_SECONDS = 3.0


class _Version(msgspec.Struct):
    version: str


class OwnProvenance:
    """See Provenance. The engine whose record lies in `folder`."""

    def __init__(self, folder: Path, device: Literal["auto", "cpu", "cuda"]) -> None:
        self._folder, self._choice = EngineFolder(folder), device

    def describe(self, model: Model) -> Origin:
        record = self._folder.read()
        if record is None or record.model != model.name:
            return make_origin(EngineFact(OWN), describe_model(model))
        command = record.command
        arguments = command[command.index("serve") + 1 :] if "serve" in command else command[1:]
        engine = EngineFact(
            kind=OWN,
            versions=ask_versions([record.url]),
            arguments=tuple(arguments),
            device=self._device,
            dtype=last_option(arguments, "--dtype") or "auto",
            started_at=record.started_at,
        )
        template = last_option(arguments, "--chat-template")
        return make_origin(engine, describe_model(model, Path(template) if template else None))

    @cached_property
    def _device(self) -> str:
        return resolve_device(self._choice)


class ExternalProvenance:
    """See Provenance. The servers behind ENGINE_URL."""

    def __init__(self, urls: str, api_key: str) -> None:
        self._urls, self._api_key = split_urls(urls), api_key

    def describe(self, model: Model) -> Origin:
        return make_origin(EngineFact(EXTERNAL, ask_versions(self._urls, self._api_key)), ModelFact(model.name))


def ask_versions(urls: Sequence[str], api_key: str = "") -> tuple[str, ...]:
    """Return the versions that the servers give, each once; servers that do not answer are left out."""
    found: dict[str, None] = {}
    for url in urls:
        try:
            answer = msgspec.json.decode(fetch_json(f"{url}/version", api_key, ASK_SECONDS), type=_Version)
        except (OSError, HTTPException, ValueError, msgspec.DecodeError):
            continue
        found[answer.version] = None
    return tuple(found)


def last_option(arguments: Sequence[str], option: str) -> str | None:
    """Return the value of a command line option, of its last mention: `--a b` or `--a=b`, `_` or `-` alike."""
    value = None
    for argument, following in pairwise((*arguments, "")):
        name, separator, told = argument.partition("=")
        if name.replace("_", "-") == option:
            value = told if separator else following
    return value
