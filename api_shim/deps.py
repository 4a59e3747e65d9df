"""What routes are given: the adapters, the object that a path names, JSON parameters. Decides the 404s."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from anyio import CapacityLimiter, Event
from fastapi import Depends, Request

from api_shim.errors import BODY_TOO_LARGE, UNSUPPORTED_TYPE
from api_shim.turns import Turns
from vllm_batch_dagster.composition import build_pauses
from vllm_batch_dagster.core.creation import Randomness, is_storable
from vllm_batch_dagster.core.errors import InvalidInput, NotFound
from vllm_batch_dagster.core.models import Batch, File
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore, ModelCatalog, Workspace
from vllm_batch_dagster.core.preflight import ModelFacts
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages.intake import find_file
from vllm_batch_dagster.stages.pausing import PauseBoard

MAX_JSON_BYTES = 1 << 20
DISK_THREADS = 16
MOST_FOLLOWERS = 100  # of results of open batches: each looks once a second
MOST_PREFLIGHTS = 2  # at once: they take a core each
MOST_WEBHOOK_TESTS = 8  # at once: a receiver that hangs takes a thread for ten seconds
PROJECT = "vllm_batch.project"  # key of the ASGI scope; missing where a stranger may look too
_JSON_TYPE = re.compile(r"application/(?:[\w.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)


class Arrivals:
    """Uploads that are under way, so that a stop can wait until each has kept or removed its file. One event loop."""

    def __init__(self) -> None:
        self._count = 0
        self._idle: Event | None = None

    @contextmanager
    def counted(self) -> Iterator[None]:
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            if self._idle is not None and not self._count:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Return when none is left. Called once, after the last one has begun."""
        if self._count:
            self._idle = Event()
            await self._idle.wait()


class Seats:
    """A bounded number of answers that go on for long. One event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    @property
    def are_full(self) -> bool:
        return self.taken >= self.most

    @contextmanager
    def one(self) -> Iterator[None]:
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a route may touch; one per app, none in a module. `started_at` in unix seconds.

    `disk` limits the threads of uploads and downloads, so that a slow disk never starves the other routes;
    `completions` are the uploads that are being completed.
    """

    settings: Settings
    store: BatchStore
    files: FileStore
    workspace: Workspace
    catalog: ModelCatalog
    facts: ModelFacts
    clock: Clock
    randomness: Randomness
    started_at: int
    disk: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(DISK_THREADS))
    arrivals: Arrivals = field(default_factory=Arrivals)
    followers: Seats = field(default_factory=lambda: Seats(MOST_FOLLOWERS))
    preflights: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MOST_PREFLIGHTS))
    webhook_tests: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MOST_WEBHOOK_TESTS))
    completions: Turns = field(default_factory=Turns)
    pauses: PauseBoard = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pauses", build_pauses(self.settings, self.store, self.clock))


async def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


async def get_project(request: Request) -> str:
    """The project of the caller, as api_shim/auth.py found it. Whatever a route reads or writes belongs to it."""
    project_id: str = request.scope[PROJECT]
    return project_id


ProjectDep = Annotated[str, Depends(get_project)]


def get_file(file_id: str, services: ServicesDep, project_id: ProjectDep) -> File:
    if not is_storable(file_id):
        raise NotFound("file", file_id)
    return find_file(file_id, services.store, services.clock(), project_id)


def get_batch(batch_id: str, services: ServicesDep, project_id: ProjectDep) -> Batch:
    if not is_storable(batch_id):
        raise NotFound("batch", batch_id)
    return services.store.batches.get(batch_id, project_id=project_id)


def get_cursor(after: str | None = None) -> str | None:
    """The query parameter `after`: the id of the last object of the page before."""
    if after is not None and not is_storable(after):
        raise unknown_cursor(after)
    return after


def unknown_cursor(after: str | None) -> InvalidInput:
    return InvalidInput(
        f"Invalid 'after': no object with id '{after}'. Send the id of the last object of the page before.",
        param="after",
        code="invalid_value",
    )


async def read_json_object(request: Request) -> dict[str, object]:
    """The body as a JSON object of at most 1 MiB. Raises InvalidInput (415, 413, 400)."""
    content_type = request.headers.get("content-type", "")
    if not _JSON_TYPE.fullmatch(content_type):
        raise InvalidInput(
            f"Unsupported content type: '{content_type}'. This API method only accepts 'application/json' "
            "requests. Send the header 'Content-Type: application/json'.",
            code=UNSUPPORTED_TYPE,
        )
    return decode_object(await _read_all(request.stream(), MAX_JSON_BYTES))


def decode_object(body: bytes) -> dict[str, object]:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as failure:
        raise InvalidInput(
            f"We could not parse the JSON body of your request: {failure}.", code="invalid_json"
        ) from failure
    if not isinstance(value, dict):
        raise InvalidInput("The JSON body of your request must be an object.", code="invalid_json")
    return value


async def _read_all(stream: AsyncIterator[bytes], limit: int) -> bytes:
    body = bytearray()
    async for data in stream:
        body += data
        if len(body) > limit:
            raise InvalidInput(f"The JSON body is larger than {limit} bytes.", code=BODY_TOO_LARGE)
    return bytes(body)


FileDep = Annotated[File, Depends(get_file)]
BatchDep = Annotated[Batch, Depends(get_batch)]
CursorDep = Annotated[str | None, Depends(get_cursor)]
JsonDep = Annotated[dict[str, object], Depends(read_json_object)]
