"""A batch as its client sees it, from creation to end: statuses, times, counts, model, usage (contract C.2, C.3)."""

import asyncio
from typing import Any

import pytest
from starlette.testclient import TestClient

from vllm_batch_dagster.adapters.local_files import LocalWorkspace
from vllm_batch_dagster.adapters.memory import EchoEngine, FixedClock, MemoryCatalog
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.ports import BatchStore, EngineAnswer, EngineRequest, FileStore
from vllm_batch_dagster.core.states import BatchEvent
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages.inference import InferencePolicy, InferencePorts, RangeInference
from vllm_batch_dagster.stages.merging import MergePorts, merge_batch
from vllm_batch_dagster.stages.validation import ValidationLimits, validate_batch

MODEL = Model("tiny", "models/tiny")
EXPIRY = {"anchor": "created_at", "seconds": 3600}
TIMES = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")
LINES = b"".join(
    b'{"custom_id":"%d","method":"POST","url":"/v1/chat/completions",'
    b'"body":{"model":"tiny","messages":[{"role":"user","content":"hi"}]}}\n' % number
    for number in range(4)
)


class Life:
    """What Dagster does with a batch, by hand; `show` is what its client sees."""

    def __init__(
        self, client: TestClient, settings: Settings, store: BatchStore, files: FileStore, clock: FixedClock
    ) -> None:
        self._client, self._store, self._files, self.clock = client, store, files, clock
        self._workspace = LocalWorkspace(settings.batches_folder, settings.datasets_folder)
        self.id = ""

    def create(self, content: bytes, **params: object) -> dict[str, Any]:
        uploaded = self._client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})
        fields = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **params}
        made = self._client.post("/v1/batches", json={"input_file_id": uploaded.json()["id"], **fields})
        self.id = made.json()["id"]
        return dict(made.json())

    def show(self) -> dict[str, Any]:
        return dict(self._client.get(f"/v1/batches/{self.id}").json())

    def times(self) -> dict[str, int]:
        """The times that are set, but for the creation and the deadline."""
        shown = self.show()
        return {name: shown[name] for name in TIMES if shown[name] is not None}

    def validate(self) -> None:
        batch, limits = self._store.batches.get(self.id), ValidationLimits(chunk_size=2, chunk_slots=40)
        catalog = MemoryCatalog([MODEL])
        validate_batch(batch, self._store, self._files, self._workspace, catalog, limits, self.clock)

    def infer(self, engine: EchoEngine, *indexes: int) -> None:
        chunks = [self._store.chunks.get(self.id, index) for index in indexes]
        asyncio.run(
            RangeInference(
                InferencePorts(self._store, self._files, self._workspace, engine, self.clock),
                InferencePolicy(commit_seconds=0.01),
                self._store.batches.get(self.id),
                MODEL,
                chunks,
                fresh=frozenset(),
                run_id="run",
                on_done=lambda _done: None,
                report=lambda _said: None,
            ).run()
        )

    def advance(self, event: BatchEvent) -> None:
        self._store.batches.advance(self.id, event, int(self.clock()))

    def merge(self) -> None:
        names = iter(["file-out", "file-err"])
        ports = MergePorts(self._store, self._files, self._workspace, self.clock, lambda: next(names))
        merge_batch(self._store.batches.get(self.id), ports, run_id="merge")


@pytest.fixture
def life(client: TestClient, settings: Settings, store: BatchStore, files: FileStore, clock: FixedClock) -> Life:
    return Life(client, settings, store, files, clock)


def counts(total: int, completed: int, failed: int) -> dict[str, int]:
    return {"total": total, "completed": completed, "failed": failed}


def facts(shown: dict[str, Any]) -> tuple[object, ...]:
    names = ("status", "model", "errors", "request_counts", "output_file_id", "error_file_id")
    return tuple(shown[name] for name in names)


def test_a_batch_that_completes(life: Life) -> None:
    made, created = life.create(LINES), int(life.clock())
    assert facts(made) == ("validating", None, None, counts(0, 0, 0), None, None)
    assert (made["usage"], life.times()) == (None, {})
    life.clock.advance(3)
    life.validate()
    assert facts(life.show()) == ("in_progress", "tiny", None, counts(4, 0, 0), None, None)
    assert life.show()["usage"]["total_tokens"] == 0
    life.clock.advance(10)
    life.infer(EchoEngine(), 0)
    half = life.show()
    assert facts(half) == ("in_progress", "tiny", None, counts(4, 2, 0), None, None)
    assert half["usage"]["total_tokens"] > 0
    life.infer(EchoEngine(), 1)
    life.advance(BatchEvent.MERGE)
    assert facts(life.show()) == ("finalizing", "tiny", None, counts(4, 4, 0), None, None)
    life.clock.advance(2)
    life.merge()
    whole = life.show()
    assert facts(whole) == ("completed", "tiny", None, counts(4, 4, 0), "file-out", None)
    assert whole["usage"]["total_tokens"] > half["usage"]["total_tokens"]
    assert life.times() == {
        "in_progress_at": created + 3,
        "finalizing_at": created + 13,
        "completed_at": created + 15,
    }
    assert whole["expires_at"] == created + 86_400


def test_a_batch_whose_requests_all_fail_completes_without_an_output_file(life: Life) -> None:
    def refuse(_request: EngineRequest) -> EngineAnswer:
        return EngineAnswer(400, b'{"error":{"message":"no"}}', "id", 0.1)

    life.create(LINES)
    life.validate()
    life.infer(EchoEngine(refuse), 0, 1)
    life.merge()
    assert facts(life.show()) == ("completed", "tiny", None, counts(4, 0, 4), None, "file-err")
    assert life.show()["usage"]["total_tokens"] == 0


def test_a_batch_that_fails(life: Life) -> None:
    life.create(LINES + b"nonsense\n")
    life.clock.advance(3)
    life.validate()
    shown = life.show()
    assert shown["errors"]["object"] == "list"
    assert [(error["code"], error["line"]) for error in shown["errors"]["data"]] == [("invalid_json_line", 5)]
    assert facts({**shown, "errors": None}) == ("failed", None, None, counts(0, 0, 0), None, None)
    assert (shown["usage"], life.times()) == (None, {"failed_at": int(life.clock())})


def test_a_batch_that_is_cancelled_half_way(life: Life) -> None:
    life.create(LINES)
    life.validate()
    life.infer(EchoEngine(), 1)
    life.clock.advance(5)
    life.advance(BatchEvent.CANCEL)
    assert facts(life.show()) == ("cancelling", "tiny", None, counts(4, 2, 0), None, None)
    life.clock.advance(1)
    life.merge()
    assert facts(life.show()) == ("cancelled", "tiny", None, counts(4, 2, 2), "file-out", "file-err")
    now = int(life.clock())
    assert life.times() == {"in_progress_at": now - 6, "cancelling_at": now - 1, "cancelled_at": now}


def test_a_batch_that_expires_half_way(life: Life) -> None:
    life.create(LINES, completion_window="90m")
    life.validate()
    life.infer(EchoEngine(), 0)
    life.clock.advance(5400)
    life.merge()
    assert facts(life.show()) == ("expired", "tiny", None, counts(4, 2, 2), "file-out", "file-err")
    now = int(life.clock())
    assert life.times() == {"in_progress_at": now - 5400, "expired_at": now}


def test_a_lenient_batch_counts_its_bad_lines_from_the_start(life: Life) -> None:
    life.create(LINES + b"nonsense\n", metadata={"validation": "lenient"})
    life.validate()
    assert facts(life.show()) == ("in_progress", "tiny", None, counts(5, 0, 1), None, None)
    life.infer(EchoEngine(), 0, 1)
    life.merge()
    assert facts(life.show()) == ("completed", "tiny", None, counts(5, 4, 1), "file-out", "file-err")


def test_the_files_live_as_long_as_was_asked(life: Life, client: TestClient) -> None:
    life.create(LINES + b"{\n", metadata={"validation": "lenient"}, output_expires_after=EXPIRY)
    life.validate()
    life.infer(EchoEngine(), 0, 1)
    life.clock.advance(50)
    life.merge()
    for file_id in ("file-out", "file-err"):
        file = client.get(f"/v1/files/{file_id}").json()
        assert (file["purpose"], file["expires_at"]) == ("batch_output", file["created_at"] + 3600)
