"""The shape of the graph, as Dagster sees it, and what loading it costs and touches."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from vllm_batch_dagster.definitions import defs
from vllm_batch_dagster.settings import PROJECT_ROOT

pytestmark = pytest.mark.timeout(300)

LOAD_CPU_SECONDS = 3.0

BATCHES = "batches"
CELLS = "batch x chunk"
ASSETS = {
    "validated_input": {
        "partitions": BATCHES,
        "deps": {},
        "group": "batch",
        "kinds": {"jsonl"},
        "checks": {"lines_valid": None},
        "pool": None,
    },
    "chunk_results": {
        "partitions": CELLS,
        "deps": {"validated_input": "MultiToSingleDimensionPartitionMapping"},
        "group": "batch",
        "kinds": {"vllm"},
        "checks": {"every_line_answered": CELLS, "error_rate": CELLS},
        "pool": "engine",
    },
    "merged_output": {
        "partitions": BATCHES,
        "deps": {"chunk_results": "MultiToSingleDimensionPartitionMapping"},
        "group": "batch",
        "kinds": {"jsonl"},
        "checks": {"counts_conserved": None, "custom_ids_once": None},
        "pool": None,
    },
    "deliveries": {
        "partitions": BATCHES,
        "deps": {"merged_output": "IdentityPartitionMapping"},
        "group": "batch",
        "kinds": {"python"},
        "checks": {"handlers_delivered": BATCHES, "webhooks_delivered": BATCHES},
        "pool": None,
    },
    "curated_export": {
        "partitions": BATCHES,
        "deps": {"merged_output": "IdentityPartitionMapping"},
        "group": "batch",
        "kinds": {"parquet", "polars"},
        "checks": {"tasks_pushed": BATCHES},
        "pool": None,
    },
}
REVIEW_ASSETS = {
    name: {"partitions": None, "deps": deps, "group": "review", "kinds": kinds, "checks": checks, "pool": None}
    for name, deps, kinds, checks in (
        ("reviewed_items", {"curated_export": "AllPartitionMapping"}, {"parquet", "label_studio"}, {}),
        ("training_dataset", {"reviewed_items": "AllPartitionMapping"}, {"jsonl", "parquet"}, {}),
        ("gold_set", {"reviewed_items": "AllPartitionMapping"}, {"parquet"}, {}),
        ("regression_report", {"gold_set": "AllPartitionMapping"}, {"parquet"}, {"agrees_with_people": None}),
    )
}
JOBS = {
    "validate_batch": {"validated_input"},
    "infer_chunks": {"chunk_results"},
    "finalize_batch": {"merged_output", "deliveries", "curated_export"},
    "deliver_batch": {"deliveries"},
}
SCHEDULES = {
    "retention_schedule": ("retention", "17 * * * *"),
    "curate_schedule": ("curate_batch", "43 * * * *"),
    "pull_reviews_schedule": ("pull_reviews", "*/10 * * * *"),
}
SENSORS = {
    "reconcile_batches": (1, set(JOBS)),
    "stop_idle_engine": (30, set()),
    "watch_inbox": (5, {"ingest_inbox"}),
    "watch_regressions": (15, {"report_regression"}),
}

# Run in a fresh process: what loading writes, opens, connects to, imports and costs.
LOAD = """
import json, os, resource, sys
touched = []
def watch(event, arguments):
    if event in ("sqlite3.connect", "socket.connect", "socket.bind", "os.mkdir"):
        touched.append(f"{event} {arguments[0]}")
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and arguments[0] != os.devnull:
        touched.append(f"open {arguments[0]}")
sys.addaudithook(watch)
sys.path.insert(0, sys.argv[1])
from vllm_batch_dagster.definitions import defs
jobs = [job.name for job in defs().get_repository_def().get_all_jobs()]
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "jobs": jobs, "touched": touched, "modules": sorted(sys.modules), "cpu": usage.ru_utime + usage.ru_stime,
}))
"""
# Heavy, and needed by no process that only loads the graph.
FOREIGN = ("vllm", "torch", "transformers", "polars", "pandas", "numpy", "pyarrow")
LATER = ("sqlalchemy", "alembic", "psycopg", "aiohttp", "fastapi", "openai", "api_shim")


@pytest.fixture(scope="module")
def repository() -> dg.RepositoryDefinition:
    return defs().get_repository_def()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process with no environment reports. Its working folder is in `folder`."""
    folder = tmp_path_factory.mktemp("empty")
    child = [sys.executable, "-B", "-W", "ignore", "-c", LOAD, str(PROJECT_ROOT)]
    done = subprocess.run(child, env={}, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "folder": folder}


def name_partitions(partitions: dg.PartitionsDefinition | None) -> str | None:
    if isinstance(partitions, dg.DynamicPartitionsDefinition):
        return partitions.name
    if isinstance(partitions, dg.MultiPartitionsDefinition):
        return " x ".join(dimension.name for dimension in partitions.partitions_defs)
    assert partitions is None
    return None


def describe_asset(graph: AssetGraph, key: dg.AssetKey) -> dict[str, Any]:
    node = graph.get(key)
    specs = [graph.get_check_spec(check) for check in node.check_keys]
    return {
        "partitions": name_partitions(node.partitions_def),
        "deps": {
            parent.to_user_string(): type(graph.get_partition_mapping(key, parent)).__name__
            for parent in node.parent_keys
        },
        "group": node.group_name,
        "kinds": {tag.removeprefix("dagster/kind/") for tag in node.tags if tag.startswith("dagster/kind/")},
        "checks": {spec.name: name_partitions(spec.partitions_def) for spec in specs},
        "pool": next(iter(node.pools or ()), None),
    }


def test_the_assets(repository: dg.RepositoryDefinition) -> None:
    graph = repository.asset_graph
    shown = {key.to_user_string(): describe_asset(graph, key) for key in graph.get_all_asset_keys()}
    assert shown == ASSETS | REVIEW_ASSETS


def test_every_asset_and_check_says_what_it_is(repository: dg.RepositoryDefinition) -> None:
    graph = repository.asset_graph
    assert all(graph.get(key).description for key in graph.get_all_asset_keys())
    assert all(graph.get_check_spec(key).description for key in graph.asset_check_keys)


def test_the_chunks(repository: dg.RepositoryDefinition) -> None:
    """A run takes a range of them; one that is not asked for is left alone; 40 slots a batch."""
    assets = repository.assets_defs_by_key[dg.AssetKey("chunk_results")]
    assert assets.backfill_policy == dg.BackfillPolicy.single_run()
    assert assets.can_subset
    assert next(iter(assets.specs)).skippable
    cells = assets.partitions_def
    assert isinstance(cells, dg.MultiPartitionsDefinition)
    slots = cells.get_partitions_def_for_dimension("chunk").get_partition_keys()
    assert (len(slots), slots[0], slots[-1]) == (40, "0000", "0039")


def test_the_number_of_slots_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNK_SLOTS", "7")
    chunks = defs().get_repository_def().assets_defs_by_key[dg.AssetKey("chunk_results")]
    cells = chunks.partitions_def
    assert isinstance(cells, dg.MultiPartitionsDefinition)
    assert len(cells.get_partitions_def_for_dimension("chunk").get_partition_keys()) == 7


def test_the_jobs(repository: dg.RepositoryDefinition) -> None:
    for name, assets in JOBS.items():
        job = repository.get_job(name)
        assert {key.to_user_string() for key in job.asset_layer.executable_asset_keys} == assets
        assert job.executor_def.name == "in_process"
    retried = {"dagster/retry_on_asset_or_op_failure": "true", "dagster/max_retries": "2"}
    assert repository.get_job("infer_chunks").tags == repository.get_job("finalize_batch").tags == retried
    assert not repository.get_job("validate_batch").tags
    assert not repository.get_job("deliver_batch").tags  # what failed is tried again by the sensor, in its own time


def test_the_sensors(repository: dg.RepositoryDefinition) -> None:
    shown = {}
    for sensor in repository.sensor_defs:
        assert sensor.default_status is dg.DefaultSensorStatus.RUNNING, sensor.name
        assert sensor.description
        targets = {target.job_name for target in sensor.targets}
        shown[sensor.name] = (sensor.minimum_interval_seconds, targets)
    assert shown == SENSORS


def test_the_schedules(repository: dg.RepositoryDefinition) -> None:
    assert {each.name: (each.job_name, each.cron_schedule) for each in repository.schedule_defs} == SCHEDULES
    for schedule in repository.schedule_defs:
        assert schedule.default_status is dg.DefaultScheduleStatus.RUNNING
        assert schedule.description
        assert repository.get_job(schedule.job_name).executor_def.name == "in_process"


def test_it_loads_with_an_empty_environment(loaded: dict[str, Any]) -> None:
    assert set(JOBS) <= set(loaded["jobs"])


def test_loading_touches_nothing(loaded: dict[str, Any]) -> None:
    assert loaded["touched"] == []
    assert list(Path(loaded["folder"]).iterdir()) == []


@pytest.mark.parametrize("name", FOREIGN + LATER)
def test_loading_does_not_import(loaded: dict[str, Any], name: str) -> None:
    assert name not in loaded["modules"]


def test_loading_takes_little_of_the_processor(loaded: dict[str, Any]) -> None:
    """User and system time of the process, which another load on the machine does not change much."""
    assert loaded["cpu"] < LOAD_CPU_SECONDS
