"""The models that requests may name: models.yaml and MODEL, or what the servers behind ENGINE_URL serve.

In: a catalogue file, read again when it changes. Out: `Model` values for validation (is this name known?), for the
engine manager (what to start) and for GET /v1/models. Servers of somebody else are asked when a name is looked up, not
before.
"""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

import msgspec
import yaml

from vllm_batch_dagster.adapters.followed_catalog import FollowedCatalog
from vllm_batch_dagster.core.errors import ConfigurationError, EngineUnavailable
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import ModelCatalog

ASK_SECONDS = 5.0
REMEMBER_SECONDS = 10.0
_MOST_BYTES = 4 << 20
_MEND = "an entry has `name` and `path`, and may have `aliases`, `task` (generate or embed) and `args`"

_Name = Annotated[str, msgspec.Meta(min_length=1)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One model in the file."""

    name: _Name
    path: _Name
    aliases: list[_Name] | None = None
    task: Literal["generate", "embed"] = "generate"
    args: list[str | int | float] | None = None


class _CatalogueFile(msgspec.Struct, forbid_unknown_fields=True):
    models: list[Any] | None = None


class _Card(msgspec.Struct):
    """One entry of the engine's GET /v1/models. `root` is the model that it was started with."""

    id: str
    root: str | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


def load_catalog(path: Path, extra: str = "", engine_url: str = "", api_key: str = "") -> ModelCatalog:
    """Read the catalogue at `path`, and add the model `extra` (a Hugging Face id or a local folder).

    With `engine_url` (comma-separated base URLs; `api_key` is their bearer key) the servers say what there is, and
    the file only adds what it knows of those models. Raises ConfigurationError with the mend.
    """

    def read() -> tuple[Model, ...]:
        models = read_models(path, required=not extra and not engine_url)
        return _add_extra(models, extra) if extra else models

    models = read()
    if not engine_url:
        return FollowedCatalog(path, models, read)
    # Imported here: it brings the HTTP client along, which nobody needs who runs the engine himself.
    from vllm_batch_dagster.adapters.engine.remote import split_urls

    return ServedCatalog(split_urls(engine_url), models, api_key=api_key)


class ServedCatalog:
    """What the servers serve now, together; see ModelCatalog. An answer holds for 10 s, and a server that does not
    answer adds nothing: lines go only to servers that have their model (adapters/engine/pool.py).

    A model is known under the names that the server itself takes, because requests reach it unchanged. `listed`
    models lend it their order, task and arguments. `clock` in seconds, of any origin.
    """

    def __init__(
        self,
        urls: Sequence[str],
        listed: Sequence[Model],
        *,
        api_key: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._urls, self._listed, self._api_key, self._clock = urls, listed, api_key, clock
        self._lock = Lock()
        self._known: tuple[Model, ...] = ()
        self._known_until = float("-inf")

    def find(self, name: str) -> Model | None:
        """Raises EngineUnavailable when no server answers."""
        return find_model(self.all(), name)

    def all(self) -> Sequence[Model]:
        """Raises EngineUnavailable when no server answers."""
        with self._lock:
            if self._clock() >= self._known_until:
                self._known = _join(self._ask_all(), self._listed)
                self._known_until = self._clock() + REMEMBER_SECONDS
            return self._known

    def _ask_all(self) -> Mapping[str, str]:
        """Ask all at once, so that one that hangs takes no longer than itself. The earlier server names a model."""
        with ThreadPoolExecutor(len(self._urls), "catalogue") as pool:
            answers = list(pool.map(self._ask, self._urls))
        served = [answer for answer in answers if not isinstance(answer, EngineUnavailable)]
        if not served:
            raise EngineUnavailable("; ".join(map(str, answers)))
        joined: dict[str, str] = {}
        for answer in served:
            joined = {**joined, **{name: root for name, root in answer.items() if name not in joined}}
        return joined

    def _ask(self, url: str) -> Mapping[str, str] | EngineUnavailable:
        try:
            return ask_served(url, self._api_key)
        except EngineUnavailable as error:
            return error


def find_model(models: Sequence[Model], name: str) -> Model | None:
    """Return the model that goes by `name`."""
    return next((model for model in models if name in model.names), None)


def read_models(path: Path, *, required: bool = True) -> tuple[Model, ...]:
    """Return the models of the catalogue file, none for a missing one that is not `required`.

    Raises ConfigurationError that names the entry and the mend.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if required:
            raise ConfigurationError(
                f"there is no model catalogue at {path}: run `make setup`, or set MODELS_FILE / MODEL"
            ) from None
        return ()
    except OSError as error:
        raise ConfigurationError(f"the model catalogue {path} cannot be read: {error.strerror}") from error
    models = [_read_entry(path, number, raw) for number, raw in enumerate(_read_file(path, content), start=1)]
    _refuse_repeats(path, models)
    return tuple(models)


def _read_file(path: Path, content: bytes) -> list[Any]:
    try:
        shape = msgspec.convert(yaml.safe_load(content) or {}, _CatalogueFile)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigurationError(
            f"the model catalogue {path} cannot be read: {_explain(error)}. "
            f"It has one key, `models`: a list, where {_MEND}."
        ) from error
    return shape.models or []


def _explain(error: Exception) -> str:
    """Return one line, also for an error of the YAML parser, which draws a picture."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _read_entry(path: Path, number: int, raw: object) -> Model:
    try:
        entry = msgspec.convert(raw, _Entry)
    except msgspec.ValidationError as error:
        name = raw.get("name") if isinstance(raw, Mapping) else None
        which = f"entry {number} ({name})" if name else f"entry {number}"
        raise ConfigurationError(f"{path}: {which} of `models` is wrong: {error}. Mend it: {_MEND}.") from error
    return Model(
        name=entry.name,
        path=_resolve(path.parent, entry.path),
        task=entry.task,
        aliases=tuple(entry.aliases or ()),
        args=tuple(str(argument) for argument in entry.args or ()),
    )


def _resolve(folder: Path, text: str) -> str:
    """Return the absolute path of a model folder, or `text` itself when it is a Hugging Face id.

    `owner/model` could be either: it is a path if the folder is there.
    """
    # abspath: a link to a model keeps its name, and nothing needs to exist.
    absolute = os.path.abspath(folder / Path(text).expanduser())  # noqa: PTH100
    return absolute if _looks_like_path(text) or Path(absolute).is_dir() else text


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~"))


def _refuse_repeats(path: Path, models: Sequence[Model]) -> None:
    owners: dict[str, int] = {}
    for number, model in enumerate(models, start=1):
        for name in model.names:
            if name in owners:
                raise ConfigurationError(
                    f"{path}: the name {name!r} stands in entry {owners[name]} and in entry {number} of `models`. "
                    "Rename or remove one: names and aliases must differ."
                )
            owners[name] = number


def _add_extra(models: tuple[Model, ...], extra: str) -> tuple[Model, ...]:
    """Append the model of MODEL, unless the file has it already: then the file's entry, with its arguments, holds."""
    if find_model(models, extra):
        return models
    resolved = _resolve(Path.cwd(), extra)
    if _looks_like_path(extra) and not Path(resolved).is_dir():
        raise ConfigurationError(f"MODEL is {extra!r}, but there is no folder {resolved}: set it to a model's folder")
    short = Path(resolved).name
    is_free = short != extra and not find_model(models, short)
    return (*models, Model(name=extra, path=resolved, aliases=(short,) if is_free else ()))


def fetch_models(url: str, api_key: str, seconds: float = ASK_SECONDS) -> bytes:
    """Return what the server at `url` answers to GET /v1/models, within `seconds`. Raises what urllib raises."""
    return fetch_json(f"{url}/v1/models", api_key, seconds)


def fetch_json(url: str, api_key: str, seconds: float) -> bytes:
    """Return what `url` answers, within `seconds`. Raises what urllib raises."""
    request = urllib.request.Request(url)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    # Like our engine client, past any proxy of the environment: engines are neighbours.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=seconds) as response:
        return bytes(response.read(_MOST_BYTES))


def ask_served(url: str, api_key: str = "") -> Mapping[str, str]:
    """Return the names that the server at `url` serves, each with the model behind it. Waits 5 s at most.

    Raises EngineUnavailable when it does not answer, or not as a vLLM server.
    """
    try:
        cards = msgspec.json.decode(fetch_models(url, api_key), type=_Cards)
    except urllib.error.HTTPError as error:
        mend = "set ENGINE_API_KEY" if error.code in (401, 403) else "check that ENGINE_URL is a vLLM server"
        raise EngineUnavailable(f"{url}/v1/models answers {error.code}: {mend}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise EngineUnavailable(
            f"{url} does not answer ({reason}): check ENGINE_URL and that the server runs"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineUnavailable(f"{url}/v1/models is no list of models: check ENGINE_URL") from error
    return {card.id: card.root or card.id for card in cards.data}


def _join(served: Mapping[str, str], listed: Sequence[Model]) -> tuple[Model, ...]:
    """Return the models behind the `served` names: those of the file first and in its order, then the others."""
    known = [_narrow(model, served) for model in listed if not served.keys().isdisjoint(model.names)]
    named = {name for model in known for name in model.names}
    others = [Model(name=name, path=root) for name, root in served.items() if name not in named]
    return (*known, *others)


def _narrow(model: Model, served: Mapping[str, str]) -> Model:
    """Return `model` with only those of its names that the server takes."""
    name, *aliases = (name for name in model.names if name in served)
    return replace(model, name=name, aliases=tuple(aliases))
