"""What can be known of a model without running it: its tokenizer, and how long a request may be.

Used by the pre-flight. In: a catalogue entry. Where the model's files are not on this machine it says so; nothing is
downloaded.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec

from vllm_batch_dagster.adapters.catalog import fetch_models
from vllm_batch_dagster.adapters.chat_templates import read_json
from vllm_batch_dagster.adapters.tokenizers import EstimatedCounter, load_counter
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.preflight import ContextLength
from vllm_batch_dagster.core.prompts import TokenCounter

ASK_SECONDS = 3.0
_KEPT_COUNTERS = 2  # a large vocabulary takes a hundred megabytes
_OPTION = "--max-model-len"
# As vLLM looks for them; the smallest holds.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
_HUB = "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


class LocalModelFacts:
    """See ModelFacts. `engine_folder` is that of our own engine, `engine_url` ENGINE_URL (comma-separated),
    `extra_args` the operator's ENGINE_ARGS. Safe to use from many threads. Raises ConfigurationError for a wrong URL.
    """

    def __init__(self, engine_folder: Path, engine_url: str = "", api_key: str = "", extra_args: str = "") -> None:
        self._engine_folder = engine_folder
        self._urls: Sequence[str] = ()
        if engine_url:  # imported here: it brings the HTTP client along
            from vllm_batch_dagster.adapters.engine.remote import split_urls

            self._urls = split_urls(engine_url)
        self._api_key, self._extra_args = api_key, extra_args
        self._lock = Lock()
        self._counters: dict[tuple[str, float], TokenCounter] = {}

    def counter(self, model: Model) -> TokenCounter:
        folder = find_model_folder(model)
        if folder is None:
            return EstimatedCounter(f"the files of {model.path} are not on this machine")
        key = (str(folder), _changed_at(folder / "tokenizer.json"))
        with self._lock:
            if key not in self._counters:
                while len(self._counters) >= _KEPT_COUNTERS:
                    del self._counters[next(iter(self._counters))]
                self._counters[key] = load_counter(folder)
            return self._counters[key]

    def context(self, model: Model) -> ContextLength | None:
        return self._running(model) or self._argued(model) or read_context(model)

    def _running(self, model: Model) -> ContextLength | None:
        """Ask the engine, if it runs and serves `model`. It may have made the context fit its memory."""
        # The engine's package brings its HTTP client along, which is not needed before.
        from vllm_batch_dagster.adapters.engine.folder import EngineFolder

        urls = self._urls
        if not urls:
            record = EngineFolder(self._engine_folder).read()
            is_up = record is not None and record.model == model.name and record.is_ready and record.is_alive
            urls = (record.url,) if record is not None and is_up else ()
        for url in urls:
            served = ask_lengths(url, self._api_key)
            for name in model.names:
                if name in served:
                    return ContextLength(served[name], "as the running engine says")
        return None

    def _argued(self, model: Model) -> ContextLength | None:
        try:
            arguments = (*model.args, *shlex.split(self._extra_args))
        except ValueError:
            return None
        for argument, following in pairwise((*arguments, "")):
            name, separator, value = argument.partition("=")
            if name.replace("_", "-") == _OPTION:
                text = value if separator else following
                return ContextLength(int(text), f"as {_OPTION} says") if text.isdecimal() else None
        return None


def find_model_folder(model: Model) -> Path | None:
    """Return the folder with the model's files: its path, or where the hub's cache of this machine keeps it."""
    folder = Path(model.path)
    if folder.is_dir():
        return folder
    cache = next((os.environ[name] for name in _HUB if os.environ.get(name)), None)
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = Path(cache or f"{home}/hub").expanduser() / f"models--{model.path.replace('/', '--')}"
    try:
        revision = (hub / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = hub / "snapshots" / revision
    return snapshot if revision and snapshot.is_dir() else None


def read_context(model: Model) -> ContextLength | None:
    """Return the longest request of which the model's own files speak."""
    folder = find_model_folder(model)
    if folder is None:
        return None
    sentence = _positive(read_json(folder / "sentence_bert_config.json").get("max_seq_length"))
    if sentence:
        return ContextLength(sentence, "as the model's sentence_bert_config.json says")
    config = read_json(folder / "config.json")
    inner = config.get("text_config")
    nested: Mapping[str, Any] = inner if isinstance(inner, dict) else {}
    found = [_positive(part.get(key)) for part in (config, nested) for key in _LENGTH_KEYS]
    lengths = [length for length in found if length]
    if not lengths:
        return None
    told = _positive(read_json(folder / "tokenizer_config.json").get("model_max_length"))
    source = "as the model's config.json says; an engine with little memory may take less"
    return ContextLength(min([*lengths, *([told] if told else [])]), source)


def ask_lengths(url: str, api_key: str = "") -> Mapping[str, int]:
    """Return the context length of each name that the server at `url` serves; empty when it does not answer."""
    try:
        cards = msgspec.json.decode(fetch_models(url, api_key, ASK_SECONDS), type=_Cards)
    except (OSError, ValueError, msgspec.DecodeError):
        return {}
    return {card.id: card.max_model_len for card in cards.data if card.max_model_len}


def _positive(value: object) -> int | None:
    """An integer above zero: tokenizer configurations write 1e30 for `no limit`."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40 else None


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
