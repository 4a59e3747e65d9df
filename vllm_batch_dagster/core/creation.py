"""Rules for making files and batches: parameters in, checked values or InvalidInput out. Called by intake.

Limits, codes and sentences are OpenAI's (contract A.1 and C.1; the sentences as its live API words them).
Ids are made from randomness that the caller gives.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.models import (
    DAY_SECONDS,
    DEFAULT_FILE_LIFETIME_SECONDS,
    DEFAULT_PROJECT,
    ENDPOINTS,
    UPLOAD_PURPOSES,
    Batch,
)
from vllm_batch_dagster.core.repair import check_plan
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.core.windows import WindowRule, describe_windows, window_seconds

Randomness = Callable[[int], bytes]

ID_BYTES = 16
MIN_EXPIRY_SECONDS = 3_600
MAX_EXPIRY_SECONDS = 30 * DAY_SECONDS
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_INPUT_FILE_ID = 512
MAX_FILENAME = 255
UNNAMED_FILE = "upload"  # what the openai client calls raw bytes (contract A.1)

_TYPE_WORDS: tuple[tuple[type, str], ...] = (
    (bool, "a boolean"),
    (int, "an integer"),
    (float, "a decimal number"),
    (str, "a string"),
    (list, "an array"),
    (dict, "an object"),
)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the sender says about a file. `expires_after` in seconds from its creation; None = the default."""

    filename: str
    purpose: str
    expires_after: int | None = None
    project_id: str = DEFAULT_PROJECT


@dataclass(frozen=True, slots=True)
class BatchParams:
    """Checked parameters of a new batch. `window` and `output_expires_after` in seconds."""

    input_file_id: str
    endpoint: str
    completion_window: str
    window: int
    metadata: Mapping[str, str] | None
    output_expires_after: int | None


def new_file_id(randomness: Randomness) -> str:
    return f"file-{randomness(ID_BYTES).hex()}"


def new_batch_id(randomness: Randomness) -> str:
    return f"batch_{randomness(ID_BYTES).hex()}"


def read_batch_params(params: Mapping[str, object], windows: WindowRule = WindowRule.OPENAI) -> BatchParams:
    """Check the parameters of POST /v1/batches. Parameters that OpenAI does not know are ignored.

    Raises InvalidInput for the first one that is missing or wrong.
    """
    input_file_id = _require_text(params, "input_file_id", MAX_INPUT_FILE_ID)
    endpoint = _require_text(params, "endpoint")
    if endpoint not in ENDPOINTS:
        raise unsupported_value("endpoint", endpoint, ENDPOINTS)
    completion_window = _require_text(params, "completion_window")
    return BatchParams(
        input_file_id=input_file_id,
        endpoint=endpoint,
        completion_window=completion_window,
        window=read_window(completion_window, windows),
        metadata=check_plan(read_metadata(params.get("metadata"))),
        output_expires_after=read_expiry(params.get("output_expires_after"), "output_expires_after"),
    )


def make_batch(params: BatchParams, batch_id: str, created_at: int, project_id: str = DEFAULT_PROJECT) -> Batch:
    """Return the new batch. Its deadline is set at once (contract C.2 leaves that open)."""
    return Batch(
        id=batch_id,
        input_file_id=params.input_file_id,
        endpoint=params.endpoint,
        completion_window=params.completion_window,
        status=BatchStatus.VALIDATING,
        created_at=created_at,
        expires_at=created_at + params.window,
        metadata=params.metadata,
        output_expires_after=params.output_expires_after,
        project_id=project_id,
    )


def read_window(text: str, rule: WindowRule = WindowRule.OPENAI) -> int:
    """Return the seconds of a `completion_window`. Raises InvalidInput."""
    seconds = window_seconds(text, rule)
    if seconds is None:
        raise InvalidInput(
            f"Invalid value: '{text[:100]}'. Supported values are: {describe_windows(rule)}.",
            param="completion_window",
            code="invalid_value",
        )
    return seconds


def read_purpose(value: str | None) -> str:
    """Return the purpose of an upload. Raises InvalidInput."""
    if value is None:
        raise missing_parameter("purpose")
    if value not in UPLOAD_PURPOSES:
        raise unsupported_value("purpose", value, UPLOAD_PURPOSES)
    return value


def read_expiry(value: object, param: str) -> int | None:
    """Return the seconds of an `{"anchor": "created_at", "seconds": n}` object; None stays None.

    Raises InvalidInput outside of 3600 .. 2592000 (1 h to 30 d, contract A.1).
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise wrong_type(param, "an object", value)
    if (anchor := _require_text(value, "anchor", prefix=f"{param}.")) != "created_at":
        raise unsupported_value(f"{param}.anchor", anchor, ("created_at",))
    if "seconds" not in value:
        raise missing_parameter(f"{param}.seconds")
    seconds = value["seconds"]
    if not isinstance(seconds, int) or isinstance(seconds, bool):
        raise wrong_type(f"{param}.seconds", "an integer", seconds)
    if seconds < MIN_EXPIRY_SECONDS:
        raise below_minimum(f"{param}.seconds", seconds, MIN_EXPIRY_SECONDS)
    if seconds > MAX_EXPIRY_SECONDS:
        raise above_maximum(f"{param}.seconds", seconds, MAX_EXPIRY_SECONDS)
    return seconds


def read_metadata(value: object) -> Mapping[str, str] | None:
    """Return the metadata as sent; null and absent are both None. Raises InvalidInput (contract C.1)."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise wrong_type("metadata", "an object", value)
    if len(value) > MAX_METADATA_PAIRS:
        raise InvalidInput(
            f"Invalid 'metadata': too many properties. Expected an object with at most {MAX_METADATA_PAIRS} "
            f"properties, but got an object with {len(value)} properties instead.",
            param="metadata",
            code="object_above_max_properties",
        )
    return {key: _check_pair(key, item) for key, item in value.items()}


def expires_at(facts: FileFacts, created_at: int) -> int | None:
    """Return when a file expires: as asked; else 30 days for purpose batch and never for the others."""
    if facts.expires_after is not None:
        return created_at + facts.expires_after
    return created_at + DEFAULT_FILE_LIFETIME_SECONDS if facts.purpose == "batch" else None


def clean_filename(name: str | None) -> str:
    """Return the last part of a sender's path, without what no database or terminal should get."""
    last = (name or "").replace("\\", "/").rpartition("/")[2]
    clean = "".join(letter for letter in last if letter.isprintable())
    return clean[:MAX_FILENAME].strip() or UNNAMED_FILE


def missing_parameter(param: str) -> InvalidInput:
    return InvalidInput(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def wrong_type(param: str, expected: str, value: object) -> InvalidInput:
    """`expected` is in words: "a string"."""
    got = next((word for kind, word in _TYPE_WORDS if isinstance(value, kind)), "null")
    return InvalidInput(
        f"Invalid type for '{param}': expected {expected}, but got {got} instead.",
        param=param,
        code="invalid_type",
    )


def unsupported_value(param: str, value: str, supported: Iterable[str]) -> InvalidInput:
    return InvalidInput(
        f"Invalid value: '{value[:100]}'. Supported values are: {_enumerate(supported)}.",
        param=param,
        code="invalid_value",
    )


def below_minimum(param: str, value: object, low: object) -> InvalidInput:
    return InvalidInput(
        f"Invalid '{param}': integer below minimum value. Expected a value >= {low}, but got {value} instead.",
        param=param,
        code="integer_below_min_value",
    )


def above_maximum(param: str, value: object, high: object) -> InvalidInput:
    return InvalidInput(
        f"Invalid '{param}': integer above maximum value. Expected a value <= {high}, but got {value} instead.",
        param=param,
        code="integer_above_max_value",
    )


def check_text(param: str, text: str, longest: int) -> None:
    """Raises InvalidInput for a text that is too long, or that a database cannot keep."""
    if len(text) > longest:
        raise InvalidInput(
            f"Invalid '{param}': string too long. Expected a string with maximum length {longest}, "
            f"but got a string with length {len(text)} instead.",
            param=param,
            code="string_above_max_length",
        )
    if not is_storable(text):
        raise InvalidInput(
            f"Invalid '{param}': the string holds U+0000 or half of a surrogate pair. Remove it.",
            param=param,
            code="invalid_value",
        )


def is_storable(text: str) -> bool:
    """False for a text with U+0000 (PostgreSQL refuses it) or with a lone surrogate (it has no UTF-8)."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)


def _check_pair(key: str, value: object) -> str:
    if len(key) > MAX_METADATA_KEY:
        raise InvalidInput(
            f"Invalid property name in 'metadata': '{key[:100]}' is too long. Expected a string with maximum "
            f"length {MAX_METADATA_KEY}, but got a string with length {len(key)} instead.",
            param=f"metadata.{key[:100]}",
            code="property_name_above_max_length",
        )
    check_text("metadata", key, MAX_METADATA_KEY)
    if not isinstance(value, str):
        raise wrong_type(f"metadata.{key}", "a string", value)
    check_text(f"metadata.{key}", value, MAX_METADATA_VALUE)
    return value


def _require_text(params: Mapping[str, object], name: str, longest: int = MAX_METADATA_VALUE, prefix: str = "") -> str:
    param = prefix + name
    if name not in params:
        raise missing_parameter(param)
    value = params[name]
    if not isinstance(value, str):
        raise wrong_type(param, "a string", value)
    check_text(param, value, longest)
    return value


def _enumerate(values: Iterable[str]) -> str:
    quoted = [f"'{value}'" for value in values]
    if len(quoted) < 3:
        return " and ".join(quoted)
    return f"{', '.join(quoted[:-1])}, and {quoted[-1]}"
