"""A batch on the shipped in-memory and local adapters: what the tests of the stages act upon, without Dagster."""

import asyncio
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.small_services import Signals, Stack, supervising
from vllm_batch_dagster.adapters.local_files import LocalFiles, LocalWorkspace
from vllm_batch_dagster.adapters.memory import EchoEngine, Faults, FixedClock, MemoryCatalog, MemoryStore
from vllm_batch_dagster.cli.group_log import GroupLog
from vllm_batch_dagster.core.journal import JournalRecord, read_records
from vllm_batch_dagster.core.models import Batch, File, Model, StopReason
from vllm_batch_dagster.core.modes import ValidationMode
from vllm_batch_dagster.core.pause_ports import Watch
from vllm_batch_dagster.core.pauses import Pause
from vllm_batch_dagster.core.ports import EngineAnswer, EngineManager, EngineRequest, FileStore
from vllm_batch_dagster.core.retry import RetryPolicy
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.stages.attempts import ChunkAttempt, PendingLine
from vllm_batch_dagster.stages.inference import ChunkDone, InferencePolicy, InferencePorts, RangeInference
from vllm_batch_dagster.stages.merging import MergePorts, MergeReport, merge_batch
from vllm_batch_dagster.stages.pausing import PauseBoard
from vllm_batch_dagster.stages.validation import ValidationLimits, ValidationReport, validate_batch

CHAT = "/v1/chat/completions"
TINY, OTHER = Model("tiny", "models/tiny", aliases=("small",)), Model("other", "models/other")
FAST = InferencePolicy(
    retry=RetryPolicy(line_attempts=3, base=0.0, cap=0.0), chunk_attempts=3, commit_seconds=0.01, poll_seconds=0.01
)
DAY = 86_400
Reply = EngineAnswer | Exception | None


def request_line(custom_id: str, /, **changes: Any) -> bytes:
    """A line that passes validation, but for `changes` of its fields; None leaves a field out."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"question {custom_id}"}]}
    whole = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes
    return msgspec.json.encode({name: value for name, value in whole.items() if value is not None}) + b"\n"


def request_lines(count: int) -> bytes:
    return b"".join(request_line(f"id-{number}") for number in range(count))


def answer_of(body: bytes, status: int = 200) -> EngineAnswer:
    return EngineAnswer(status, body, "engine-id", 0.01)


def line_of(request: EngineRequest) -> int:
    """The line's number in its batch, from 0."""
    return int(request.request_id.rpartition("-")[2])


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another task does. The limit is one for a machine that has little time for us."""
    async with asyncio.timeout(50):
        while not condition():  # noqa: ASYNC110 - conditions are of many kinds, some behind threads
            await asyncio.sleep(0.002)


class WatchedEngine(EchoEngine):
    """The echo engine; it notes what arrives, and keeps a line back as long as `holds` is true for it."""

    def __init__(
        self, faults: Faults | None = None, *, holds: Callable[[int], bool] = lambda _line: False, **options: Any
    ) -> None:
        super().__init__(faults, **options)
        self.holds = holds
        self.requests: list[EngineRequest] = []
        self.in_flight: set[int] = set()
        self.most_in_flight = 0

    @property
    def asked(self) -> list[int]:
        """Lines in the order of arrival, with repeats."""
        return [line_of(request) for request in self.requests]

    def release(self) -> None:
        self.holds = lambda _line: False

    async def answer(self, model: Model, request: EngineRequest) -> EngineAnswer:
        line = line_of(request)
        self.requests.append(request)
        self.in_flight.add(line)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        try:
            await until(lambda: not self.holds(line))
            return await super().answer(model, request)
        finally:
            self.in_flight.discard(line)


class Rig:
    """One installation in a folder. Methods take the id of a batch, and read its state from the store each time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store, self.clock, self.catalog = MemoryStore(), FixedClock(), MemoryCatalog([TINY, OTHER])
        self.files: FileStore = LocalFiles(folder / "files")
        self.workspace = LocalWorkspace(folder / "batches", folder / "datasets")
        self._numbers = itertools.count(1)
        self.default_mode = ValidationMode.STRICT

    def new_id(self) -> str:
        return f"file-{next(self._numbers)}"

    def upload(self, content: bytes, purpose: str = "batch", expires_at: int | None = None) -> str:
        file_id, now = self.new_id(), int(self.clock())
        stored = self.files.create(file_id)
        stored.write(content)
        size, digest = stored.commit()
        self.store.files.add(File(file_id, size, now, "in.jsonl", purpose, digest, expires_at))
        return file_id

    def create(self, file_id: str, endpoint: str = CHAT, metadata: Mapping[str, str] | None = None) -> str:
        batch_id, now = f"batch_{next(self._numbers)}", int(self.clock())
        batch = Batch(batch_id, file_id, endpoint, "24h", BatchStatus.VALIDATING, now, now + DAY, metadata)
        self.store.batches.add(batch)
        return batch_id

    def batch(self, batch_id: str) -> Batch:
        return self.store.batches.get(batch_id)

    def validate(self, batch_id: str, chunk_size: int = 5, **limits: int) -> ValidationReport:
        bounds = ValidationLimits(**{"chunk_size": chunk_size, "chunk_slots": 40} | limits, mode=self.default_mode)
        ports = (self.store, self.files, self.workspace, self.catalog)
        return validate_batch(self.batch(batch_id), *ports, bounds, self.clock)

    def start(self, content: bytes | int, chunk_size: int = 5) -> str:
        """Create a batch of these lines, or of so many, and bring it to `in_progress`."""
        lines = request_lines(content) if isinstance(content, int) else content
        batch_id = self.create(self.upload(lines))
        report = self.validate(batch_id, chunk_size)
        assert self.batch(batch_id).status is BatchStatus.IN_PROGRESS, report.errors
        return batch_id

    async def infer(
        self,
        batch_id: str,
        engine: EngineManager,
        *,
        fresh: Collection[int] = (),
        only: Collection[int] | None = None,
        policy: InferencePolicy = FAST,
        done: list[ChunkDone] | None = None,
        model: Model = TINY,
        watches: Sequence[Watch] = (),
        said: list[str] | None = None,
    ) -> StopReason | Pause | None:
        """Run the chunks without a result, or `only` those given; `done` collects what is published."""
        wanted = [
            chunk
            for chunk in self.store.chunks.list(batch_id)
            if (not chunk.is_published if only is None else chunk.index in only)
        ]
        board = PauseBoard(self.store.pauses, self.clock, passing=watches)
        ports = InferencePorts(self.store, self.files, self.workspace, engine, self.clock, pauses=board)
        finished: list[ChunkDone] = [] if done is None else done
        sentences: list[str] = [] if said is None else said
        return await RangeInference(
            ports,
            policy,
            self.batch(batch_id),
            model,
            wanted,
            fresh=frozenset(fresh),
            run_id="run",
            on_done=finished.append,
            report=sentences.append,
        ).run()

    def begin(self, batch_id: str, chunk: int = 0, *, fresh: bool = False) -> ChunkAttempt:
        """Begin an attempt by hand, without an engine."""
        planned = self.store.chunks.get(batch_id, chunk)
        parts = (self.store, self.files, self.workspace, self.batch(batch_id), planned)
        return ChunkAttempt.begin(*parts, fresh=fresh, run_id="by hand", clock=self.clock)

    def merge(self, batch_id: str) -> MergeReport:
        ports = MergePorts(self.store, self.files, self.workspace, self.clock, self.new_id)
        return merge_batch(self.batch(batch_id), ports, run_id="merge")

    def stored_lines(self, file_id: str | None) -> list[bytes]:
        """The lines of a stored file, none for None."""
        if file_id is None:
            return []
        with self.files.open(file_id) as content:
            return content.read().splitlines(keepends=True)

    def output(self, batch_id: str) -> list[dict[str, Any]]:
        return [msgspec.json.decode(line) for line in self.stored_lines(self.batch(batch_id).output_file_id)]

    def errors(self, batch_id: str) -> list[dict[str, Any]]:
        return [msgspec.json.decode(line) for line in self.stored_lines(self.batch(batch_id).error_file_id)]

    def journal(self, batch_id: str, chunk: int, epoch: int) -> Sequence[JournalRecord]:
        path = self.workspace.journal_path(batch_id, chunk, epoch)
        if not path.exists():
            return ()
        with path.open("rb") as journal:
            return [placed.record for placed in read_records(journal)]


def answer(line: PendingLine, *, ok: bool = True) -> None:
    """Give a line of an attempt that was begun by hand an answer that names its epoch, and make it durable."""
    attempt = line.attempt
    body = b'{"epoch":%d}' % attempt.epoch if ok else b'{"error":{"message":"no"}}'
    attempt.accept(line, answer_of(body, 200 if ok else 400), ok, 1)
    attempt.commit(attempt.take_commit())


def ids(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row["custom_id"] for row in rows]


def id_range(*bounds: int) -> list[str]:
    """The custom_ids that `request_lines` gives to a range of lines."""
    return [f"id-{number}" for number in range(*bounds)]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.fixture
def signals() -> Signals:
    return Signals()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[GroupLog]:
    log = GroupLog(tmp_path / "logs", None, {})
    yield log
    log.close()


@pytest.fixture
def stack(tmp_path: Path, log: GroupLog, signals: Signals) -> Iterator[Stack]:
    """A maker of supervisors over small services; whatever a test leaves behind is killed."""
    with supervising(tmp_path, log, signals) as make:
        yield make
