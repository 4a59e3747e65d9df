"""The way back in the graph: what the assets show, who asks for them, and a regression from the gold set to its check.

The annotations come from a project in memory at the port; a real Label Studio is in tests/label_studio.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import SecretStr

from tests.defs.graph import SLOTS, Graph, rows, said, values
from tests.unit.review_samples import annotation, task
from tests.unit.review_source import Project
from vllm_batch_dagster.core.errors import ReviewFailed
from vllm_batch_dagster.defs import reviews
from vllm_batch_dagster.defs.assets import build_assets
from vllm_batch_dagster.defs.jobs import build_jobs
from vllm_batch_dagster.defs.reviews import build_review_assets, build_reviews
from vllm_batch_dagster.defs.sensors import build_sensors
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages.gold_sets import read_gold
from vllm_batch_dagster.stages.versions import latest_version

ON = {"label_studio_url": "http://127.0.0.1:9", "label_studio_api_key": SecretStr("key")}


class ReviewGraph(Graph):
    """The graph with the way back."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance, **settings: object) -> None:
        super().__init__(folder, instance, **settings)
        jobs = build_jobs()
        more, self.schedule, self.sensor = build_reviews()
        self.definitions = dg.Definitions(
            assets=[*build_assets(SLOTS), *build_review_assets()],
            jobs=[*jobs, *more],
            sensors=[*build_sensors(jobs), self.sensor],
            schedules=[self.schedule],
            resources={"services": self.services},
            executor=dg.in_process_executor,
        )

    @property
    def datasets(self) -> Path:
        return self.services.settings.datasets_folder

    def do(self, job: str, config: dict[str, Any] | None = None) -> dg.ExecuteInProcessResult:
        """Execute a job with the config of its launchpad."""
        return self.definitions.resolve_job_def(job).execute_in_process(
            instance=self.instance, run_config=config or {}, raise_on_error=False
        )

    def ask(self) -> dg.RunRequest | dg.SkipReason:
        context = dg.build_schedule_context(
            instance=self.instance,
            scheduled_execution_time=datetime(2026, 11, 26, 3, 0, tzinfo=UTC),
            resources={"services": self.services},
        )
        asked = self.schedule(context)
        assert isinstance(asked, dg.RunRequest | dg.SkipReason)
        return asked

    def watch(self) -> Sequence[dg.RunRequest]:
        context = dg.build_sensor_context(instance=self.instance, resources={"services": self.services})
        return self.sensor.evaluate_tick(context).run_requests or ()


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project()

    @contextmanager
    def opened(settings: Settings) -> Iterator[Sequence[Project]]:
        yield [project]

    monkeypatch.setattr(reviews, "open_annotation_sources", opened)
    return project


@pytest.fixture
def back(tmp_path: Path, instance: dg.DagsterInstance) -> ReviewGraph:
    return ReviewGraph(tmp_path, instance, **ON)


def shown(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node(asset)
    return values(event.metadata)


def review_all(project: Project, batch_id: str, expected: str) -> None:
    """Two accepted answers and one corrected, all with the expected text."""
    project.put(
        *(
            task(
                number,
                annotation(number, rating=5, **answers),
                batch=batch_id,
                answers=(answer,),
                custom_id=f"line-{number}",
            )
            for number, answer, answers in (
                (0, expected, {"verdict": "accept"}),
                (1, expected, {"verdict": "accept"}),
                (2, "wrong", {"verdict": "edit", "correction": expected}),
            )
        )
    )


def test_reviews_become_sets(back: ReviewGraph, project: Project) -> None:
    review_all(project, back.merged(3), "It is so.")
    result = back.do("pull_reviews")
    assert result.success
    pulled = shown(result, "reviewed_items")
    assert (pulled["items"], pulled["annotations"], pulled["new_versions"]) == (3, 3, 3)
    assert "| accept | 2 |" in pulled["verdicts"]
    made = shown(result, "training_dataset")
    assert (made["sft_lines"], made["dpo_lines"], made["kto_lines"], made["is_new"]) == (3, 1, 4, True)
    assert "| nothing_to_compare | 2 |" in made["no_dpo_line"]
    assert shown(result, "gold_set")["items"] == 3

    again = back.do("pull_reviews")
    assert shown(again, "reviewed_items")["new_versions"] == 0
    assert shown(again, "training_dataset")["is_new"] is False
    assert shown(again, "training_dataset")["version"] == made["version"]


def test_agreement_of_several_people(back: ReviewGraph, project: Project) -> None:
    project.put(
        task(1, annotation(1, by=1, verdict="accept"), annotation(2, by=2, verdict="accept")),
        task(2, annotation(3, by=1, verdict="accept"), annotation(4, by=2, verdict="reject")),
    )
    pulled = shown(back.do("pull_reviews"), "reviewed_items")
    assert (pulled["reviewed_by_several"], pulled["agreement"]) == (2, 0.5)


def test_without_label_studio_nothing_is_pulled(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    back = ReviewGraph(tmp_path, instance)
    assert "LABEL_STUDIO_URL" in str(back.ask())
    result = back.do("pull_reviews")
    assert result.success
    assert shown(result, "reviewed_items")["items"] == 0


def test_a_label_studio_that_is_gone_fails_the_run(
    back: ReviewGraph, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.put(task(1, annotation(1, verdict="accept")))
    project.fails_after = 0
    assert not back.do("pull_reviews").success
    project.fails_after = None
    assert shown(back.do("pull_reviews"), "reviewed_items")["new_versions"] == 1

    def gone() -> str:
        raise ReviewFailed("the server is gone")

    monkeypatch.setattr(project, "newest", gone)
    assert back.ask() == dg.SkipReason("the server is gone")


def test_the_schedule_asks_when_there_is_news(back: ReviewGraph, project: Project) -> None:
    assert isinstance(back.ask(), dg.SkipReason)
    project.put(task(1, annotation(1, verdict="accept")))
    assert isinstance(back.ask(), dg.RunRequest)
    assert back.do("pull_reviews").success
    assert back.ask() == dg.SkipReason("nothing has changed in Label Studio since the last pull")


def regression(back: ReviewGraph, project: Project, expected: str) -> str:
    """Return the batch of a regression over three gold prompts."""
    review_all(project, back.merged(3), expected)
    assert back.do("pull_reviews").success
    assert back.do("regression_batch").success
    (place,) = (back.datasets / "regression").iterdir()
    return place.name


def test_a_regression_from_the_gold_set_to_its_check(back: ReviewGraph, project: Project) -> None:
    batch_id = regression(back, project, "It is so.")
    batch = back.batch(batch_id)
    gold = latest_version(back.datasets / "gold")
    assert gold is not None
    assert batch.metadata is not None
    assert batch.metadata["regression_of"] == gold.name.removeprefix("version=")
    assert back.watch() == (), "an open batch has no report"
    back.engine.reply = lambda request: said(request, "It is so." if request.request_id[-1] != "1" else "No idea.")
    back.finish(batch_id)
    assert back.custom_ids(back.batch(batch_id).output_file_id) == [item.id for item in read_gold(gold)]

    (request,) = back.watch()
    assert request.run_key == f"regression:{batch_id}@{back.batch(batch_id).merged_version}"
    result = back.do("report_regression", dict(request.run_config))
    assert result.success
    report = shown(result, "regression_report")
    assert (report["prompts"], report["exact"], report["unanswered"]) == (3, 2, 0)
    assert report["agreement"] == pytest.approx(2 / 3, abs=1e-4)
    assert report["agreement_of_the_reviewed_answers"] == pytest.approx(2 / 3, abs=1e-4)
    assert "0.9 to 1.0  █" in report["scores_chart"]
    (event,) = result.asset_materializations_for_node("regression_report")
    worst = rows(event.metadata["worst"])
    assert [row["token_f1"] for row in worst] == [0.0, 1.0, 1.0]
    assert all("answer" not in row for row in worst), "texts are shown only with UI_SAMPLES"
    (check,) = result.get_asset_check_evaluations()
    assert (check.check_name, check.passed) == ("agrees_with_people", True)
    assert back.watch() == (), "it is made"


def test_a_threshold_that_is_not_reached(back: ReviewGraph, project: Project) -> None:
    batch_id = regression(back, project, "It is so.")
    back.engine.reply = lambda request: said(request, "Never.")
    back.finish(batch_id)
    (check,) = back.do("report_regression").get_asset_check_evaluations()
    assert not check.passed
    config = {"ops": {"regression_report": {"config": {"batch_id": batch_id, "threshold": 0.0}}}}
    (check,) = back.do("report_regression", config).get_asset_check_evaluations()
    assert check.passed


def test_a_model_that_is_not_there_answers_nothing(back: ReviewGraph, project: Project) -> None:
    review_all(project, back.merged(3), "It is so.")
    assert back.do("pull_reviews").success
    assert back.do("regression_batch", {"ops": {"start_regression": {"config": {"model": "gone"}}}}).success
    (place,) = (back.datasets / "regression").iterdir()
    assert json.loads((place / "started.json").read_bytes())["model"] == "gone"
    back.finish(place.name)
    (request,) = back.watch()
    report = back.do("report_regression", dict(request.run_config))
    assert not report.get_asset_check_evaluations()[0].passed


def test_a_regression_needs_a_gold_set(back: ReviewGraph) -> None:
    assert not back.do("regression_batch").success


def test_answers_of_a_regression_are_not_reviewed_again(back: ReviewGraph, project: Project) -> None:
    batch_id = regression(back, project, "It is so.")
    back.finish(batch_id)
    (event, *_) = back.shown("curated_export", batch_id)
    assert values(event.metadata)["label_studio"].startswith("none: ")
