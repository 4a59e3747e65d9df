"""Decides about dropped files: when one is whole, what its order (the `.yaml` beside it) asks for, which ids it gets.

A dropped file becomes exactly one batch however often anything dies: the ids of its file and its batch follow from the
name of its drop, so whoever goes on with a drop finds what was made before. Pure; stages/inbox.py acts on it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

import msgspec

from vllm_batch_dagster.core.creation import Randomness
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.lines import CHAT
from vllm_batch_dagster.core.models import DEFAULT_PROJECT, ENDPOINTS

SUFFIX = ".jsonl"
ORDER_SUFFIXES = (".yaml", ".yml")
# A file whose last line has no end is most likely cut off; one that stays like that is taken as it is.
UNFINISHED_SECONDS = 60.0
_STEM_BYTES = 80


class Verdict(StrEnum):
    """Where a drop ends: the name of its folder."""

    DONE = "done"
    REJECTED = "rejected"


class _Order(msgspec.Struct, forbid_unknown_fields=True):
    """The `.yaml` beside a dropped file; every field may be left out."""

    endpoint: str | None = None
    completion_window: str = "24h"
    validation: str | None = None
    handlers: list[str] | None = None
    metadata: dict[str, str | int | float | bool] = {}
    output_expires_after: int | None = None
    project: str = DEFAULT_PROJECT


@dataclass(frozen=True, slots=True)
class Order:
    """What to do with a dropped file. `params` are those of POST /v1/batches but for the file and, if None was
    named, the endpoint."""

    params: Mapping[str, object] = field(default_factory=dict)
    project_id: str = DEFAULT_PROJECT

    def with_file(self, file_id: str, endpoint: str) -> Mapping[str, object]:
        """Return all parameters of the batch; the order's own endpoint goes before `endpoint`."""
        return {"endpoint": endpoint, **self.params, "input_file_id": file_id}


@dataclass(frozen=True, slots=True)
class Look:
    """A file as the disk shows it: seconds since its last change, and whether its last byte ends a line. `is_open`
    says that a program has it open for writing, None that the system cannot tell."""

    age: float
    ends_a_line: bool
    is_open: bool | None = None


def is_whole(look: Look, settle_seconds: float) -> bool:
    """True when nobody seems to be writing any more. A clock that is off by more than that counts as old."""
    quiet = settle_seconds if look.ends_a_line else max(settle_seconds, UNFINISHED_SECONDS)
    return not look.is_open and abs(look.age) >= quiet


def is_dropped_file(name: str) -> bool:
    """True for `questions.jsonl`, false for `.questions.jsonl` and `questions.jsonl.part`: those are still coming."""
    return name.lower().endswith(SUFFIX) and not name.startswith(".")


def order_names(name: str) -> tuple[str, ...]:
    """Return the names that the order of a dropped file may have, the preferred one first."""
    stem = name[: -len(SUFFIX)]
    return tuple(stem + suffix for suffix in ORDER_SUFFIXES)


def drop_id(name: str, now: float, random: bytes) -> str:
    """Return the name of a new drop: `questions-20261126-031500-9f2c7a1b`. `random` makes it unlike all others."""
    stem = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name[: -len(SUFFIX)])
    at = datetime.fromtimestamp(now, UTC).strftime("%Y%m%d-%H%M%S")
    short = stem.lstrip(".").encode()[:_STEM_BYTES].decode(errors="ignore")
    return f"{short or 'unnamed'}-{at}-{random.hex()}"


def randomness_of(drop: str, role: str) -> Randomness:
    """Return what stands in for randomness in the ids of a drop: the same bytes each time."""
    return lambda length: hashlib.sha256(f"{role}:{drop}".encode()).digest()[:length]


def read_order(document: object) -> Order:
    """Return the order that a YAML document holds; an empty one asks for nothing. Raises InvalidInput."""
    try:
        order = msgspec.convert({} if document is None else document, _Order)
    except msgspec.ValidationError as error:
        known = ", ".join(_Order.__struct_fields__)
        raise InvalidInput(f"the .yaml beside the file is wrong: {error}. It may hold: {known}") from error
    return Order(_params(order), order.project)


def _params(order: _Order) -> dict[str, object]:
    metadata = {name: _as_text(value) for name, value in order.metadata.items()}
    if order.handlers is not None:
        metadata["handlers"] = ",".join(order.handlers)
    if order.validation is not None:
        metadata["validation"] = order.validation
    params: dict[str, object] = {"completion_window": order.completion_window, "metadata": metadata}
    if order.endpoint is not None:
        params["endpoint"] = order.endpoint
    if order.output_expires_after is not None:
        params["output_expires_after"] = {"anchor": "created_at", "seconds": order.output_expires_after}
    return params


def _as_text(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Url(msgspec.Struct):
    url: str = ""


def guess_endpoint(first_line: bytes) -> str:
    """Return the endpoint that the first request names, chat completions when it names none that we have."""
    try:
        url = msgspec.json.decode(first_line, type=_Url).url
    except msgspec.DecodeError:
        return CHAT
    return url if url in ENDPOINTS else CHAT
