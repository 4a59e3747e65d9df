"""The way back in the graph: reviewed_items -> training_dataset, gold_set -> regression_report, and who asks for them.

A schedule pulls what people have said in Label Studio since the last time, a job asks a model the gold prompts again as
an ordinary batch, and a sensor has the report made when such a batch has ended. All of them can be switched in the UI,
and each asset can be materialized again at any time without doubling anything.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from vllm_batch_dagster.composition import hold_reviews, open_annotation_sources
from vllm_batch_dagster.core.creation import Randomness
from vllm_batch_dagster.core.errors import ReviewFailed
from vllm_batch_dagster.core.inbox import randomness_of
from vllm_batch_dagster.defs.curation import CURATED_EXPORT, OFF
from vllm_batch_dagster.defs.history import forerunners
from vllm_batch_dagster.defs.jobs import AssetJob
from vllm_batch_dagster.defs.review_metadata import (
    describe_gold_set,
    describe_pull,
    describe_regression,
    describe_started,
    describe_training_set,
)
from vllm_batch_dagster.defs.services import Services

if TYPE_CHECKING:
    from vllm_batch_dagster.stages.pulling import PullPorts, PullReport
    from vllm_batch_dagster.stages.regression import RegressionPorts

GROUP = "review"
PULL_JOB, REGRESSION_JOB, REPORT_JOB = "pull_reviews", "regression_batch", "report_regression"
EVERY_TEN_MINUTES = "*/10 * * * *"
AGREES = "agrees_with_people"
_AGREEMENT = dg.AssetCheckSpec(
    AGREES,
    asset="regression_report",
    description="The model's answers to the gold prompts agree with the people's as far as asked for.",
)


class PullConfig(dg.Config):
    """What a person may choose in the launchpad."""

    everything: bool = Field(default=False, description="Look at all tasks, not only at those that changed.")


class RegressionConfig(dg.Config):
    """What a person may choose in the launchpad."""

    model: str = Field(default="", description="A model of the catalogue. Empty: of each prompt the one it was asked.")


class ReportConfig(dg.Config):
    """What a person may choose in the launchpad."""

    batch_id: str = Field(default="", description="The batch of a regression. Empty: the newest that has ended.")
    threshold: float = Field(
        default=-1.0, le=1, description="Least agreement that passes, 0 to 1. Negative: REGRESSION_THRESHOLD."
    )


def build_review_assets() -> list[dg.AssetsDefinition]:
    return [reviewed_items(), training_dataset(), gold_set(), regression_report()]


def reviewed_items() -> dg.AssetsDefinition:
    @dg.asset(name="reviewed_items", deps=[CURATED_EXPORT], group_name=GROUP, kinds={"parquet", "label_studio"})
    def pull(
        context: dg.AssetExecutionContext, config: PullConfig, services: dg.ResourceParam[Services]
    ) -> Iterator[object]:
        """What people said about answers in Label Studio: every version of every annotation once, skipped ones too. A
        run adds what is new since the last one."""
        from vllm_batch_dagster.stages.review_counts import count_reviews
        from vllm_batch_dagster.stages.review_rows import ReviewRows

        reports = list(_pull_all(services, everything=config.everything)) if _is_on(services) else []
        for url, report in reports:
            context.log.info(f"{url}: {report.tasks} tasks changed, {report.new.total()} new versions")
        folder = _ports(services).folder
        counts = count_reviews(ReviewRows(folder), services.settings.review_rule)
        yield dg.MaterializeResult(metadata=describe_pull(reports, counts, folder, OFF))

    return pull


def _is_on(services: Services) -> bool:
    return services.settings.pushes_to_label_studio


def _pull_all(services: Services, *, everything: bool) -> "Iterator[tuple[str, PullReport]]":
    from vllm_batch_dagster.stages.pulling import pull_reviews

    with open_annotation_sources(services.settings) as sources:
        for source in sources:
            yield source.url, pull_reviews(source, _ports(services), everything=everything)


def _ports(services: Services) -> "PullPorts":
    from vllm_batch_dagster.stages.pulling import PullPorts
    from vllm_batch_dagster.stages.review_rows import DATASET

    alone: partial[AbstractContextManager[object]] = partial(hold_reviews, services.settings)
    folder = services.settings.datasets_folder / DATASET
    return PullPorts(services.store, services.files, services.workspace, folder, alone)


def training_dataset() -> dg.AssetsDefinition:
    @dg.asset(name="training_dataset", deps=["reviewed_items"], group_name=GROUP, kinds={"jsonl", "parquet"})
    def make(services: dg.ResourceParam[Services]) -> Iterator[object]:
        """All judged answers as sets that TRL reads: chats (SFT), preference pairs (DPO), labelled completions (KTO),
        and as Parquet with where each comes from. `training/latest` is always whole; older versions stay."""
        from vllm_batch_dagster.stages.training_sets import make_training_set

        version, counts = make_training_set(services.settings.datasets_folder, services.settings.review_rule)
        yield _versioned(version.id, describe_training_set(version, counts))

    return make


def gold_set() -> dg.AssetsDefinition:
    @dg.asset(name="gold_set", deps=["reviewed_items"], group_name=GROUP, kinds={"parquet"})
    def make(services: dg.ResourceParam[Services]) -> Iterator[object]:
        """Prompts with the answers that people agreed on, to measure models against."""
        from vllm_batch_dagster.stages.gold_sets import GoldRules, make_gold_set

        settings = services.settings
        rules = GoldRules(settings.review_rule, settings.gold_min_rating)
        version, counts = make_gold_set(settings.datasets_folder, rules)
        yield _versioned(version.id, describe_gold_set(version, counts))

    return make


def _versioned(version: str, metadata: dict[str, Any]) -> dg.MaterializeResult[object]:
    return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(version))


def regression_report() -> dg.AssetsDefinition:
    @dg.asset(
        name="regression_report",
        deps=["gold_set"],
        group_name=GROUP,
        kinds={"parquet"},
        check_specs=[_AGREEMENT],
    )
    def compare(config: ReportConfig, services: dg.ResourceParam[Services]) -> Iterator[object]:
        """How far a model's answers to the gold prompts agree with those that people want: of one batch of the job
        `regression_batch`. The sensor `watch_regressions` asks for it when the batch has ended."""
        from vllm_batch_dagster.stages.regression import newest_regression, report_regression

        ports = _regression_ports(services)
        store = services.store
        batch = store.batches.get(config.batch_id) if config.batch_id else newest_regression(ports.datasets, store)
        report = report_regression(batch, ports)
        least = services.settings.regression_threshold if config.threshold < 0 else config.threshold
        check = dg.AssetCheckResult(
            check_name=AGREES,
            passed=report.agreement >= least,
            metadata={"agreement": round(report.agreement, 4), "least": least, "batch": batch.id},
        )
        yield dg.MaterializeResult(metadata=describe_regression(report, least, services), check_results=[check])

    return compare


def _regression_ports(services: Services) -> "RegressionPorts":
    from vllm_batch_dagster.stages.regression import RegressionPorts

    return RegressionPorts(services.store, services.files, services.clock, services.settings.datasets_folder)


def build_reviews() -> tuple[list[AssetJob], dg.ScheduleDefinition, dg.SensorDefinition]:
    """Return the jobs, the schedule that pulls, and the sensor that has reports made."""
    pull = dg.define_asset_job(
        PULL_JOB,
        selection=dg.AssetSelection.assets("reviewed_items", "training_dataset", "gold_set"),
        executor_def=dg.in_process_executor,
        description="Pulls new reviews from Label Studio and makes the training sets and the gold set of all of them.",
    )
    report = dg.define_asset_job(
        REPORT_JOB,
        selection=dg.AssetSelection.assets("regression_report"),
        executor_def=dg.in_process_executor,
        description="Compares the answers of a regression with the gold set.",
    )
    return [pull, _regression_job(), report], _schedule(pull), _sensor(report)


def _regression_job() -> dg.JobDefinition:
    @dg.op(name="start_regression", out=dg.Out(dg.Nothing))
    def start(context: dg.OpExecutionContext, config: RegressionConfig, services: dg.ResourceParam[Services]) -> None:
        """Make a batch of the gold prompts. Its report comes by itself when it has ended."""
        from vllm_batch_dagster.stages.regression import start_regression

        # A run that takes over from one that failed goes on with its batches.
        key = (context.run.run_id, *forerunners(context.instance, context.run))[-1]
        started = start_regression(_regression_ports(services), partial(_randomness, key), config.model)
        for each in started:
            context.log.info(f"{each.batch_id} asks {each.items} prompts of the gold set {each.gold}")
        context.add_output_metadata(describe_started(started, services))

    @dg.job(
        name=REGRESSION_JOB,
        executor_def=dg.in_process_executor,
        description="Asks a model (launchpad: `model`) the prompts of the gold set again, as an ordinary batch.",
    )
    def regression_batch() -> None:
        start()

    return regression_batch


def _randomness(key: str, role: str) -> Randomness:
    return randomness_of(key, hashlib.sha256(role.encode()).hexdigest())


def _schedule(job: AssetJob) -> dg.ScheduleDefinition:
    @dg.schedule(
        name="pull_reviews_schedule",
        job=job,
        cron_schedule=EVERY_TEN_MINUTES,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Every ten minutes, when a task in Label Studio has changed since the last pull.",
    )
    def ask(
        context: dg.ScheduleEvaluationContext, services: dg.ResourceParam[Services]
    ) -> dg.RunRequest | dg.SkipReason:
        if not _is_on(services):
            return dg.SkipReason(OFF)
        try:
            is_due = _has_news(services)
        except ReviewFailed as failure:
            return dg.SkipReason(str(failure))
        if not is_due:
            return dg.SkipReason("nothing has changed in Label Studio since the last pull")
        return dg.RunRequest(run_key=f"pull:{int(context.scheduled_execution_time.timestamp())}")

    return ask


def _has_news(services: Services) -> bool:
    from vllm_batch_dagster.stages.pulling import is_behind

    folder = _ports(services).folder
    with open_annotation_sources(services.settings) as sources:
        return any(is_behind(source, folder) for source in sources)


def _sensor(job: AssetJob) -> dg.SensorDefinition:
    @dg.sensor(
        name="watch_regressions",
        job=job,
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Asks for the report of every regression whose batch has ended, and again when it is merged anew.",
    )
    def watch(services: dg.ResourceParam[Services]) -> Iterator[dg.RunRequest | dg.SkipReason]:
        from vllm_batch_dagster.stages.regression import due_reports

        due = list(due_reports(services.settings.datasets_folder, services.store))
        if not due:
            yield dg.SkipReason("no regression has ended without a report")
        for batch in due:
            config = dg.RunConfig(ops={"regression_report": ReportConfig(batch_id=batch.id)})
            yield dg.RunRequest(run_key=f"regression:{batch.id}@{batch.merged_version}", run_config=config)

    return watch
