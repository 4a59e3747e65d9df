"""The graph with a real code server, daemon, webserver and API, and a simulated engine in a process of its own.

Nothing lighter shows whether the UI's backfills work: a partition mapping that the daemon cannot see passes every other
test. What is sent to the webserver here is what the UI sends.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests.dagster_ui import BACKFILL, LOCATION, DagsterUi
from tests.defs.graph import every_id
from tests.e2e.batches import chat, finish, ids, read, submit
from tests.stack import START_SECONDS, Stack, wait_for
from vllm_batch_dagster.adapters.simulated import Faults, SimulatedProcess
from vllm_batch_dagster.cli.processes import run_workers
from vllm_batch_dagster.cli.readiness import can_start_runs
from vllm_batch_dagster.core.journal import read_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHUNK, SLOTS = 20, 6
SECONDS = 400
PER_BATCH = ("validated_input", "merged_output", "deliveries", "curated_export")

LAUNCH = """
mutation ($params: ExecutionParams!) { launchPipelineExecution(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } } } }
"""
BACKFILL_STATUS = """
query ($id: String!) { partitionBackfillOrError(backfillId: $id) {
  __typename ... on PartitionBackfill { status runs { runId status } } ... on PythonError { message } } }
"""
RUN_STATUS = "query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"


@dataclass(frozen=True, slots=True)
class World:
    """The stack, its engine, and the two ways in."""

    stack: Stack
    engine: SimulatedProcess
    client: openai.OpenAI
    ui: DagsterUi
    code_server: int

    def asked(self, batch_id: str, since: int = 0) -> list[int]:
        """Return the lines of a batch that have reached the engine, in order; without the first `since`."""
        lines = [name.rpartition("-") for name in self.engine.received()]
        return [int(line) for batch, _, line in lines if batch == batch_id][since:]

    def shown(self, batch_id: str) -> list[int]:
        """Return how many materializations each chunk slot has."""
        return [len(self.ui.materializations("chunk_results", cell)) for cell in cells(batch_id, range(SLOTS))]

    def merges(self, batch_id: str) -> int:
        return len(self.ui.materializations("merged_output", batch_id))

    def output(self, batch_id: str) -> str | None:
        return self.client.batches.retrieve(batch_id).output_file_id

    def ids(self, batch_id: str) -> Sequence[str]:
        return ids(read(self.client, self.output(batch_id)))

    def backfill(self, assets: Sequence[str], partitions: Sequence[str]) -> str:
        """Materialize partitions as the UI's dialog does. Returns the backfill's id."""
        params = {
            "selector": None,
            "assetSelection": [{"path": [asset]} for asset in assets],
            "partitionNames": list(partitions),
            "fromFailure": False,
            "tags": [],
        }
        started = self.ui.ask(BACKFILL, params=params)["launchPartitionBackfill"]
        assert started["__typename"] == "LaunchBackfillSuccess", started
        return str(started["backfillId"])

    def backfill_status(self, backfill_id: str) -> str:
        found = self.ui.ask(BACKFILL_STATUS, id=backfill_id)["partitionBackfillOrError"]
        return str(found.get("status", found))

    def backfill_runs(self, backfill_id: str) -> list[str]:
        found = self.ui.ask(BACKFILL_STATUS, id=backfill_id)["partitionBackfillOrError"]
        return [run["status"] for run in found["runs"]]

    def launch_cell(self, batch_id: str, index: int) -> str:
        """Launch one chunk as the UI does when a single partition is chosen. Returns the run's id."""
        selector = {
            "repositoryName": LOCATION["repositoryName"],
            "repositoryLocationName": LOCATION["repositoryLocationName"],
            "pipelineName": "__ASSET_JOB",
            "assetSelection": [{"path": ["chunk_results"]}],
            "assetCheckSelection": [],
        }
        chunk = f"{index:04d}"
        tags = {"": f"{batch_id}|{chunk}", "/batch": batch_id, "/chunk": chunk}
        metadata = {"tags": [{"key": f"dagster/partition{name}", "value": value} for name, value in tags.items()]}
        params = {"mode": "default", "selector": selector, "runConfigData": "{}", "executionMetadata": metadata}
        started = self.ui.ask(LAUNCH, params=params)["launchPipelineExecution"]
        assert started["__typename"] == "LaunchRunSuccess", started
        return str(started["run"]["runId"])

    def run_status(self, run_id: str) -> str:
        return str(self.ui.ask(RUN_STATUS, id=run_id)["runOrError"]["status"])


def cells(batch_id: str, indexes: Sequence[int]) -> list[str]:
    return [f"{batch_id}|{index:04d}" for index in indexes]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Eight lines at once, and 0.4 s for each: twenty lines a second."""
    folder = tmp_path_factory.mktemp("stack")
    options = ("--model", "tiny", "--latency", "0.4", "--max-num-seqs", "8")
    with SimulatedProcess(*options, witness=folder / "witness") as engine:
        sizes = {"CHUNK_SIZE": str(CHUNK), "CHUNK_SLOTS": str(SLOTS), "MAX_NUM_SEQS": "8"}
        stack = Stack(folder, ENGINE_URL=engine.url, **sizes)
        up = stack.start()
        try:
            wait_for(lambda: "ready in" in stack.said() or up.poll() is not None, START_SECONDS)
            assert up.poll() is None, stack.said()
            client = openai.OpenAI(base_url=stack.api_url, api_key="any")
            yield World(stack, engine, client, DagsterUi(stack.dagster_url), stack.pid_of("code"))
        finally:
            stack.run("down")
            up.wait()


def test_the_code_server_says_that_it_can_start_runs(world: World) -> None:
    """Asked as the supervisor asks it, by hand-made bytes."""
    assert can_start_runs("127.0.0.1", int(world.stack.env["CODE_SERVER_PORT"]))


@pytest.fixture(scope="module")
def finished(world: World) -> str:
    """A completed batch of three chunks."""
    batch = finish(world.client, submit(world.client, [chat(number, "tiny") for number in range(3 * CHUNK)]).id)
    assert batch.status == "completed"
    return batch.id


def settle(world: World, batch_id: str, is_done: Callable[[], bool]) -> None:
    """Wait until something has happened and no run of the batch is left."""
    wait_for(is_done, SECONDS)
    wait_for(lambda: not unfinished(world, batch_id), SECONDS)


def unfinished(world: World, batch_id: str) -> list[str]:
    ended = ("SUCCESS", "FAILURE", "CANCELED")
    return [run["runId"] for run in world.ui.runs(batch_id) if run["status"] not in ended]


def test_a_batch_of_several_chunks(world: World, finished: str) -> None:
    settle(world, finished, lambda: world.merges(finished) == 1)
    assert world.shown(finished) == [1] * SLOTS
    assert world.ids(finished) == every_id(3 * CHUNK)
    assert sorted(world.asked(finished)) == list(range(3 * CHUNK))
    assert [run["jobName"] for run in world.ui.runs(finished)] == ["finalize_batch", "infer_chunks", "validate_batch"]
    assert [run["status"] for run in world.ui.runs(finished)] == ["SUCCESS"] * 3
    assert all(len(world.ui.materializations(asset, finished)) == 1 for asset in PER_BATCH)


def test_a_backfill_of_two_chunks_makes_a_new_output(world: World, finished: str) -> None:
    before, shown, merges = world.output(finished), world.shown(finished), world.merges(finished)
    asked = len(world.asked(finished))

    backfill = world.backfill(["chunk_results"], cells(finished, [0, 1]))
    wait_for(lambda: world.backfill_status(backfill) == "COMPLETED_SUCCESS", SECONDS)
    settle(world, finished, lambda: world.output(finished) != before)

    assert world.backfill_runs(backfill) == ["SUCCESS"], "one run over the range"
    assert world.shown(finished) == [shown[0] + 1, shown[1] + 1, *shown[2:]]
    assert sorted(world.asked(finished, asked)) == list(range(2 * CHUNK)), "every line of both chunks, and no other"
    assert world.merges(finished) == merges + 1
    assert world.client.batches.retrieve(finished).status == "completed"
    assert world.ids(finished) == every_id(3 * CHUNK)


def test_one_chunk_launched_alone(world: World, finished: str) -> None:
    before, shown = world.output(finished), world.shown(finished)
    asked = len(world.asked(finished))

    run_id = world.launch_cell(finished, 2)
    wait_for(lambda: world.run_status(run_id) in ("SUCCESS", "FAILURE"), SECONDS)
    assert world.run_status(run_id) == "SUCCESS"
    settle(world, finished, lambda: world.output(finished) != before)

    assert world.shown(finished) == [*shown[:2], shown[2] + 1, *shown[3:]]
    assert sorted(world.asked(finished, asked)) == list(range(2 * CHUNK, 3 * CHUNK))
    assert world.ids(finished) == every_id(3 * CHUNK)


def test_a_backfill_of_everything_for_one_batch(world: World, finished: str) -> None:
    """Of this batch alone: the others keep what they show."""
    other = finish(world.client, submit(world.client, [chat(0, "tiny")]).id).id
    settle(world, other, lambda: world.merges(other) == 1)
    before, shown, merges = world.output(finished), world.shown(finished), world.merges(finished)
    asked = len(world.asked(finished))

    backfill = world.backfill([*PER_BATCH, "chunk_results"], [finished])
    wait_for(lambda: world.backfill_status(backfill) not in ("REQUESTED", "COMPLETING"), SECONDS)
    assert world.backfill_status(backfill) == "COMPLETED_SUCCESS"
    settle(world, finished, lambda: world.output(finished) != before)

    assert [after > count for after, count in zip(world.shown(finished), shown, strict=True)] == [True] * SLOTS
    assert world.merges(finished) > merges
    assert sorted(world.asked(finished, asked)) == list(range(3 * CHUNK))
    assert world.client.batches.retrieve(finished).status == "completed"
    assert world.ids(finished) == every_id(3 * CHUNK)
    assert (world.shown(other), world.merges(other)) == ([1] * SLOTS, 1)


def test_a_killed_run_worker_loses_and_doubles_nothing(world: World) -> None:
    """Exactly the lines that no journal held are sent again, and the chunks that were shown are left alone."""
    total = SLOTS * CHUNK
    world.engine.set_faults(Faults(hang_after=total - CHUNK))  # however late we look, the run is not over
    batch_id = submit(world.client, [chat(number, "tiny") for number in range(total)]).id
    wait_for(lambda: len(world.asked(batch_id)) >= total // 2, SECONDS)
    (worker,) = run_workers(world.code_server)
    worker.kill()
    worker.wait()
    for _ in range(2):  # it answers in turn: by then it has read what the dead process had sent
        world.engine.ask("/health")
    world.engine.set_faults(Faults())
    answered = journalled(world.stack.home, batch_id)
    asked = len(world.asked(batch_id))
    assert 0 < len(answered) < asked < total

    batch = finish(world.client, batch_id)

    assert batch.status == "completed"
    assert world.ids(batch_id) == every_id(total)
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (total, 0)
    assert sorted(world.asked(batch_id, asked)) == sorted(set(range(total)) - answered)
    settle(world, batch_id, lambda: world.merges(batch_id) == 1)
    assert world.shown(batch_id) == [1] * SLOTS
    assert [run["status"] for run in world.ui.runs(batch_id)].count("FAILURE") == 1


def journalled(home: Path, batch_id: str) -> set[int]:
    """Return the lines that the journals of a batch hold."""
    lines = set()
    for path in (home / "batches" / batch_id / "journal").rglob("*.jsonl"):
        with path.open("rb") as journal:
            lines |= {placed.record.line for placed in read_records(journal)}
    return lines
