"""The graph on one installation of its own: real store and files in a temporary folder, an engine without a network,
and a Dagster instance in memory. Runs are executed here as a run worker does it, one at a time.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteRepositoryOrigin

from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.core.creation import FileFacts
from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable
from vllm_batch_dagster.core.models import DEFAULT_PROJECT, Batch
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest
from vllm_batch_dagster.defs.assets import build_assets
from vllm_batch_dagster.defs.curation import build_curation
from vllm_batch_dagster.defs.jobs import build_jobs
from vllm_batch_dagster.defs.partitions import cell_key
from vllm_batch_dagster.defs.sensors import build_sensors
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages.intake import create_batch, receive_file

SLOTS = 4
NO_TAGS: Mapping[str, str] = {}
CHAT = "/v1/chat/completions"
_EVALUATION = dg.DagsterEventType.ASSET_CHECK_EVALUATION
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
# What a run that waits in the queue must name; nobody listens there.
CODE_LOCATION = RemoteRepositoryOrigin(GrpcServerCodeLocationOrigin("127.0.0.1", 1), "__repository__")

Reply = EngineAnswer | Exception | None


class Engine:
    """Notes what the engine is asked. `reply` may answer in its place; `on_restart` is called when it comes back."""

    def __init__(self) -> None:
        self.asked: list[EngineRequest] = []
        self.reply: Callable[[EngineRequest], Reply] = lambda request: None
        self.on_restart: Callable[[], None] = lambda: None

    def __call__(self, request: EngineRequest) -> Reply:
        self.asked.append(request)
        return self.reply(request)

    def restart(self) -> None:
        self.on_restart()

    def break_down(self, line: int, when: Callable[[], bool]) -> None:
        """Die at a line (0-based), and from the moment on that `when` is true, do not come back."""

        def reply(request: EngineRequest) -> Exception | None:
            return EngineUnavailable("it died") if line_of(request) == line else None

        def restart() -> None:
            if when():
                raise EngineFailure("the engine does not start")

        self.reply, self.on_restart = reply, restart

    def mend(self) -> None:
        self.reply, self.on_restart = lambda request: None, lambda: None

    def lines(self) -> list[int]:
        """Return the numbers (0-based) of the lines that were asked since the last call."""
        numbers = [line_of(request) for request in self.asked]
        self.asked.clear()
        return numbers


class Graph:
    """See the module docstring. `settings` are fields of Settings."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance, **settings: object) -> None:
        catalogue = folder / "models.yaml"
        catalogue.write_text("models:\n  - name: tiny\n    path: someone/tiny\n")
        chosen: dict[str, Any] = {"chunk_size": 3, "chunk_slots": SLOTS, "models_file": catalogue, **settings}
        self.services = Services(Settings(vllm_batch_home=folder / "home", **chosen))
        self.instance = instance
        self.engine = Engine()
        self.use_engine()
        jobs = build_jobs()
        curate, curate_schedule = build_curation()
        self.definitions = dg.Definitions(
            assets=build_assets(SLOTS),
            jobs=[*jobs, curate],
            schedules=[curate_schedule],
            sensors=build_sensors(jobs),
            resources={"services": self.services},
            executor=dg.in_process_executor,
        )

    def use_engine(self, *, window: int = 1, latency: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Choose how many lines are in flight (one: they are answered in order) and how long each takes; `clock`
        measures idleness."""
        echo = EchoEngine(self.engine, window=window, latency=latency, on_recover=self.engine.restart, clock=clock)
        self.services.__dict__["engines"] = echo  # a cached property

    def submit(self, lines: int | Sequence[bytes], **changes: Any) -> str:
        """Store a file and a batch of it, as the API does. Returns the batch's id; `changes` are fields of Batch."""
        services = self.services
        content = chat_lines(lines) if isinstance(lines, int) else lines
        project = str(changes.get("project_id", DEFAULT_PROJECT))
        facts = FileFacts("lines.jsonl", "batch", project_id=project)
        ports: dict[str, Any] = {"store": services.store, "clock": services.clock, "randomness": secrets.token_bytes}
        file = receive_file([line + b"\n" for line in content], facts, files=services.files, **ports)
        params = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
        batch = create_batch(params, project_id=project, **ports)
        if changes:
            batch = replace(batch, id=f"{batch.id}x", **changes)
            services.store.batches.add(batch)
        return batch.id

    def admit(self, lines: int | Sequence[bytes], **changes: Any) -> str:
        """Submit a batch and let the sensor see it, which adds its partition. Returns its id."""
        batch_id = self.submit(lines, **changes)
        self.tick()
        return batch_id

    def validated(self, lines: int | Sequence[bytes] = 8, **changes: Any) -> str:
        """Return a batch that has passed validation: eight lines make three chunks of four slots."""
        batch_id = self.admit(lines, **changes)
        assert self.run("validate_batch", batch_id).success
        return batch_id

    def inferred(self, lines: int | Sequence[bytes] = 8, **changes: Any) -> str:
        """Return a batch whose chunks are all shown."""
        batch_id = self.validated(lines, **changes)
        assert self.run_chunks(batch_id, 0, SLOTS - 1).success
        self.engine.lines()
        return batch_id

    def merged(self, lines: int | Sequence[bytes] = 8, **changes: Any) -> str:
        """Return a batch that is completed."""
        batch_id = self.inferred(lines, **changes)
        assert self.run("finalize_batch", batch_id).success
        return batch_id

    def batch(self, batch_id: str) -> Batch:
        return self.services.store.batches.get(batch_id)

    def tick(self) -> dg.SensorResult:
        """Evaluate the reconcile sensor and add the partitions that it asks for, as the daemon does."""
        sensor = self.definitions.resolve_sensor_def("reconcile_batches")
        context = dg.build_sensor_context(
            instance=self.instance, resources={"services": self.services}, definitions=self.definitions
        )
        result = sensor(context)
        assert isinstance(result, dg.SensorResult)
        for request in result.dynamic_partitions_requests or ():
            self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        return result

    def launch(self, request: dg.RunRequest) -> dg.JobExecutionResult:
        """Execute what the sensor has asked for."""
        assert request.job_name is not None
        return self.run(request.job_name, request.partition_key, tags=request.tags)

    def step(self) -> list[dg.JobExecutionResult]:
        """Evaluate the sensor and execute every run that it asks for."""
        return [self.launch(request) for request in self.tick().run_requests or ()]

    def finish(self, batch_id: str) -> Batch:
        """Let the sensor drive the batch to its end."""
        for _ in range(4):
            assert all(result.success for result in self.step())
        assert self.batch(batch_id).is_terminal
        return self.batch(batch_id)

    def run(
        self, job: str, partition: object = None, parent: dg.DagsterRun | None = None, tags: Mapping[str, str] = NO_TAGS
    ) -> dg.JobExecutionResult:
        """Execute a job; `parent` is the run that this one executes again."""
        run = self.create_run(job, partition, parent, tags=tags)
        return execute_run(InMemoryJob(self.definitions.resolve_job_def(job)), run, self.instance)

    def create_run(
        self,
        job: str,
        partition: object = None,
        parent: dg.DagsterRun | None = None,
        status: dg.DagsterRunStatus = dg.DagsterRunStatus.NOT_STARTED,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> dg.DagsterRun:
        definition = self.definitions.resolve_job_def(job)
        ancestry: dict[str, Any] = (
            {"parent_run_id": parent.run_id, "root_run_id": parent.root_run_id or parent.run_id} if parent else {}
        )
        own = {"dagster/partition": str(partition)} if partition else {}
        return self.instance.create_run_for_job(
            definition,
            status=status,
            tags={**definition.tags, **own, **tags},
            remote_job_origin=CODE_LOCATION.get_job_origin(job),
            **ancestry,
        )

    def run_chunks(
        self, batch_id: str, first: int, last: int, parent: dg.DagsterRun | None = None
    ) -> dg.JobExecutionResult:
        """Run a range of chunks as the UI launches it: with no tag of ours."""
        return self.run("infer_chunks", parent=parent, tags=chunk_range(batch_id, first, last))

    def has_journal(self, batch_id: str, index: int) -> bool:
        """True when answers of a chunk are on the disk."""
        folder = self.services.settings.batches_folder / batch_id / "journal" / f"{index:04d}"
        return any(path.stat().st_size for path in folder.glob("*"))

    def shown(self, asset: str, partition: object) -> list[dg.AssetMaterialization]:
        """Return the materializations of one partition, newest first."""
        wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[str(partition)])
        records = self.instance.fetch_materializations(wanted, limit=50).records
        return [record.asset_materialization for record in records if record.asset_materialization]

    def custom_ids(self, file_id: str | None) -> list[str]:
        """Return the ids in an output or error file, in order."""
        assert file_id is not None
        with self.services.files.open(file_id) as lines:
            return [json.loads(line)["custom_id"] for line in lines]

    def shown_chunk(self, batch_id: str, index: int) -> list[dg.AssetMaterialization]:
        return self.shown("chunk_results", cell_key(batch_id, index))


def chunk_range(batch_id: str, first: int, last: int) -> dict[str, str]:
    """Return the tags of a run over the chunks `first` to `last`."""
    return {RANGE_START: str(cell_key(batch_id, first)), RANGE_END: str(cell_key(batch_id, last))}


def chat_line(number: int, **changes: object) -> bytes:
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"question {number}"}]}
    return json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body} | changes).encode()


def chat_lines(count: int) -> list[bytes]:
    return [chat_line(number) for number in range(count)]


def every_id(count: int) -> list[str]:
    return [f"line-{number}" for number in range(count)]


def line_of(request: EngineRequest) -> int:
    """Return the number (0-based) of the line."""
    return int(request.request_id.rpartition("-")[2])


def refuse(request: EngineRequest) -> EngineAnswer:
    """Return the answer to a line that the engine does not take."""
    return EngineAnswer(400, b'{"error":{"message":"too hot","code":400}}', request.request_id, 0.1)


def said(request: EngineRequest, text: str) -> EngineAnswer:
    """Return an answer of the engine that says `text`."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = {"id": request.request_id, "choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": 5}}
    return EngineAnswer(200, json.dumps(body).encode(), request.request_id, 0.1)


def checks(result: dg.JobExecutionResult) -> dict[tuple[str, str | None], bool]:
    """Return (check, partition) -> passed of a run."""
    events = (event for event in result.all_events if event.event_type is _EVALUATION)
    found = (event.asset_check_evaluation_data for event in events)
    return {(each.check_name, str(each.partition) if each.partition else None): each.passed for each in found}


def materialized(result: dg.JobExecutionResult) -> list[tuple[str, str]]:
    """Return (asset, partition) of what a run materialized, in order."""
    events = (event.materialization for event in result.all_events if event.is_step_materialization)
    return [(event.asset_key.to_user_string(), str(event.partition)) for event in events]


def data_version(event: dg.AssetMaterialization) -> str:
    assert event.tags is not None
    return event.tags["dagster/data_version"]


def rows(entry: dg.MetadataValue[Any]) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    assert isinstance(entry, dg.TableMetadataValue)
    return [dict(record.data) for record in entry.records]


def values(metadata: Mapping[str, dg.MetadataValue[Any]]) -> dict[str, Any]:
    """Return the plain value of each entry."""
    return {label: entry.value for label, entry in metadata.items()}
