"""The retention job on a real Dagster instance on disk: what of a gone batch is left in its tables and folders."""

import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from tests.contract.conftest import run_postgres
from tests.defs.graph import SLOTS, Graph
from vllm_batch_dagster.cli.gc import collect
from vllm_batch_dagster.composition import build_disk
from vllm_batch_dagster.core.models import DAY_SECONDS, Batch
from vllm_batch_dagster.core.retention import Kind
from vllm_batch_dagster.defs.partitions import cell_key
from vllm_batch_dagster.defs.purge import DagsterHistory
from vllm_batch_dagster.defs.retention import build_retention

# Databases on disk, and a real server: on a busy machine some of these take half a minute.
pytestmark = pytest.mark.timeout(300)

ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]


class Site:
    """A graph whose Dagster instance is on disk, as in production, and a clock that can be set forward."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.graph = Graph(folder, instance)
        self.instance, self.services = instance, self.graph.services
        self.home = self.services.settings.dagster_home
        self.ahead = 0.0
        self.services.clock = lambda: time.time() + self.ahead  # type: ignore[method-assign]
        job, self.schedule = build_retention()
        self.definitions = dg.Definitions(jobs=[job], schedules=[self.schedule], resources={"services": self.services})

    def later(self, days: float) -> None:
        self.ahead += days * DAY_SECONDS

    def run(self, **config: bool) -> dg.JobExecutionResult:
        """Execute the job as a run worker does."""
        job = self.definitions.resolve_job_def("retention")
        run_config = {"ops": {"delete_expired": {"config": config}}}
        run = self.instance.create_run_for_job(job, run_config=run_config)
        return execute_run(InMemoryJob(job), run, self.instance)

    def tick(self, hour: int) -> list[dg.RunRequest] | str | None:
        """Evaluate the schedule; return what it asks for, or why it does not."""
        context = dg.build_schedule_context(
            instance=self.instance,
            scheduled_execution_time=datetime(2030, 1, 1, hour, 17, tzinfo=UTC),
            resources={"services": self.services},
        )
        done = self.schedule.evaluate_tick(context)
        return list(done.run_requests or ()) or done.skip_message

    def runs_of(self, batch_id: str) -> list[dg.DagsterRun]:
        return [run for run in self.instance.get_runs() if batch_id in str(run.tags)]

    def batch(self, batch_id: str) -> Batch:
        return self.graph.batch(batch_id)

    def lost_tags(self) -> int:
        """Return how many tags of events have no event."""
        with sqlite3.connect(self.home / "history" / "runs" / "index.db") as connection:
            query = "SELECT count(*) FROM asset_event_tags WHERE event_id NOT IN (SELECT id FROM event_logs)"
            return int(connection.execute(query).fetchone()[0])

    def traces(self, text: str) -> dict[str, int]:
        """Return how many rows of Dagster's databases, and how many paths, have `text` in them."""
        found: dict[str, int] = {}
        for path in sorted(self.home.rglob("*")):
            if text in path.name:
                found[str(path.relative_to(self.home))] = 1
            if path.suffix == ".db" or path.name == ".db":
                found |= {f"{path.name}:{table}": count for table, count in _rows_with(path, text).items() if count}
        return found


def _rows_with(database: Path, text: str) -> dict[str, int]:
    with sqlite3.connect(database) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            table: sum(text in repr(row) for row in connection.execute(f"SELECT * FROM {table}")) for table in tables
        }


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.delenv("DELIVERY_FOLDER", raising=False)
    home = tmp_path / "home" / "dagster"
    home.mkdir(parents=True)
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield Site(tmp_path, instance)


class TestJob:
    def test_of_a_gone_batch_nothing_is_left_in_dagster(self, site: Site) -> None:
        gone = site.graph.merged()
        kept = site.graph.merged()
        by_hand = site.graph.run_chunks(gone, 0, 0)
        assert by_hand.success
        site.graph.run("finalize_batch", gone)
        run_ids = [run.run_id for run in site.runs_of(gone)]
        assert len(run_ids) == 5
        before = site.traces(gone)
        assert {"index.db:event_logs", ".db:event_logs", "runs.db:run_tags"} <= set(before)
        kept_before = site.traces(kept)
        store = site.services.store
        for file_id in (site.batch(gone).input_file_id, str(site.batch(gone).output_file_id)):
            store.files.delete(file_id)
        site.later(1.1)
        done = site.run()

        assert done.success
        # The log of the retention run, and of each asset the one newest materialization, which the next one replaces.
        assert set(site.traces(gone)) <= {f"{done.run_id}.db:event_logs", "index.db:asset_keys"}
        assert site.lost_tags() == 0
        for run_id in run_ids:
            assert set(site.traces(run_id)) <= {"index.db:asset_keys"}
        assert site.traces(kept) == kept_before
        assert site.instance.get_dynamic_partitions("batches") == [kept]
        assert not (site.services.settings.batches_folder / gone).exists()
        assert site.batch(gone).purged_at
        assert site.batch(gone).counts.completed == 8
        assert site.graph.shown_chunk(kept, 0)
        assert site.graph.tick().run_requests == []

    def test_a_batch_with_an_unfinished_run_is_left_alone(self, site: Site) -> None:
        batch_id = site.graph.merged()
        queued = site.graph.create_run("infer_chunks", f"{batch_id}|0000", status=dg.DagsterRunStatus.QUEUED)
        site.later(31)
        assert site.run().success
        assert len(site.runs_of(batch_id)) == 4
        assert site.batch(batch_id).purged_at is None
        assert site.services.files.open(str(site.batch(batch_id).output_file_id)).read()
        site.instance.delete_run(queued.run_id)
        assert site.run().success
        assert site.batch(batch_id).purged_at
        assert not site.runs_of(batch_id)

    def test_a_dry_run_only_says_it(self, site: Site) -> None:
        batch_id = site.graph.merged()
        site.later(31)
        done = site.run(dry_run=True)
        assert done.success
        (output,) = [event for event in done.all_events if event.is_successful_output]
        shown = {name: entry.value for name, entry in output.step_output_data.metadata.items()}
        assert shown["removed batch data"] == 1
        assert shown["removed Dagster runs"] == 3
        assert shown["bytes_freed"] > 0
        assert len(site.runs_of(batch_id)) == 3
        assert site.batch(batch_id).purged_at is None

    def test_a_file_that_cannot_be_removed_fails_the_run(self, site: Site) -> None:
        batch_id = site.graph.merged()
        file_id = site.batch(batch_id).input_file_id
        (site.services.settings.files_folder / file_id).unlink()
        (site.services.settings.files_folder / file_id).mkdir()
        site.later(31)
        done = site.run()
        assert not done.success
        assert site.batch(batch_id).purged_at, "the rest was done"

    def test_its_own_runs_go_after_a_week(self, site: Site) -> None:
        first = site.run().run_id
        site.later(6.9)
        second = site.run().run_id
        assert {run.run_id for run in site.instance.get_runs()} == {first, second}
        site.later(0.2)
        third = site.run().run_id
        assert {run.run_id for run in site.instance.get_runs()} == {third}
        assert not site.traces(first)


class TestHistory:
    def test_a_backfill_over_two_batches_stays_until_the_last_of_them_goes(self, site: Site) -> None:
        first, second = sorted((site.graph.validated(), site.graph.validated()))
        history = DagsterHistory(site.instance, SLOTS)
        tags = {
            "dagster/asset_partition_range_start": str(cell_key(first, 0)),
            "dagster/asset_partition_range_end": str(cell_key(second, SLOTS - 1)),
        }
        both = site.graph.create_run("infer_chunks", tags=tags, status=dg.DagsterRunStatus.SUCCESS)
        history.forget(first)
        assert site.instance.get_run_by_id(both.run_id)
        history.forget(second)
        assert site.instance.get_run_by_id(both.run_id) is None

    def test_forgetting_twice_is_harmless(self, site: Site) -> None:
        batch_id = site.graph.validated()
        history = DagsterHistory(site.instance, SLOTS)
        foretold = history.forget(batch_id, dry_run=True)
        done = history.forget(batch_id)
        assert (done.runs, done.runs) == (foretold.runs, 1)
        assert done.bytes > 50_000
        assert history.forget(batch_id).runs == 0

    def test_in_memory_there_are_no_files(self, graph: Graph, instance: dg.DagsterInstance) -> None:
        batch_id = graph.merged()
        assert DagsterHistory(instance, SLOTS).forget(batch_id).runs == 3
        assert not instance.get_runs()
        assert not graph.shown_chunk(batch_id, SLOTS - 1), "an unused slot, shown without a run"

    def test_a_run_that_never_started_is_reported_after_a_day(self, site: Site) -> None:
        run = site.graph.create_run("validate_batch", "batch_1")
        site.graph.create_run("validate_batch", "batch_2", status=dg.DagsterRunStatus.QUEUED)
        history = DagsterHistory(site.instance, SLOTS)
        assert history.stuck(time.time()) == []
        assert history.stuck(time.time() + DAY_SECONDS + 60) == [run.run_id]


def test_dagster_on_postgres_keeps_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the containers: one event log for all runs, in which rows are all there is to delete."""
    monkeypatch.delenv("DELIVERY_FOLDER", raising=False)
    with run_postgres() as server:
        database = server.create_database()
        address = f"postgresql+psycopg2://postgres@127.0.0.1:{server.port}/{database}"
        home = tmp_path / "dagster"
        home.mkdir()
        (home / "dagster.yaml").write_text(f"storage: {{postgres: {{postgres_url: '{address}'}}}}\n")
        with dg.DagsterInstance.from_config(str(home)) as instance:
            graph = Graph(tmp_path, instance)
            gone, kept = graph.merged(), graph.merged()
            assert DagsterHistory(instance, SLOTS).forget(gone).runs == 3
            assert len(instance.get_runs()) == 3
            assert graph.shown_chunk(kept, SLOTS - 1)
            assert instance.get_dynamic_partitions("batches") == [kept]
        query = "SELECT count(*) FILTER (WHERE {0} LIKE '%{1}%'), count(*) FROM {2}"
        with server.connect(database) as connection:
            for table, column in (
                ("event_logs", "event"),
                ("run_tags", "value"),
                ("asset_check_executions", "evaluation_event"),
            ):
                found = connection.execute(query.format(column, gone, table).encode()).fetchone()
                assert found is not None
                assert (found[0], found[1] > 0) == (0, True), table


class TestSchedule:
    def test_asks_for_a_run_when_something_is_due(self, site: Site) -> None:
        site.graph.merged()
        assert site.tick(9) == "nothing has expired"
        site.later(31)
        (request,) = site.tick(9) or ()
        assert isinstance(request, dg.RunRequest)
        assert request.run_key
        assert site.run().success
        assert site.tick(9) == "nothing has expired"

    def test_asks_once_a_day_in_any_case(self, site: Site) -> None:
        asked = [hour for hour in range(24) if not isinstance(site.tick(hour), str)]
        assert asked == [3]


def test_the_command_does_the_same(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm-batch gc`, without the job, on the same state folder."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    batch_id = site.graph.merged()
    site.later(31)
    settings, clock = site.services.settings, site.services.clock
    foretold = collect(settings, clock, dry_run=True)
    assert foretold.of(Kind.DAGSTER_RUNS).count == 3
    assert list(build_disk(settings).batches())
    report = collect(settings, clock)
    assert report.tallies == foretold.tallies
    assert not site.runs_of(batch_id)
    assert not list(build_disk(settings).batches())
    assert collect(settings, clock).is_empty
