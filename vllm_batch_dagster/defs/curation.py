"""The `curated_export` asset, and the schedule that brings to Label Studio what could not be brought there at once.

The data sets on disk come first; a push that fails makes a check fail, not the run, and never changes the batch. How it
went is kept beside the selection (stages/push_records.py), where the schedule finds what to ask for again.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import dagster as dg

from vllm_batch_dagster.composition import load_curation_rules, open_review_board
from vllm_batch_dagster.core.errors import NotFound, ReviewFailed
from vllm_batch_dagster.core.gold import REGRESSION_OF
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.review import make_task
from vllm_batch_dagster.defs import checks
from vllm_batch_dagster.defs.history import read_active_batches
from vllm_batch_dagster.defs.metadata import describe_curation
from vllm_batch_dagster.defs.partitions import batches
from vllm_batch_dagster.defs.services import Services

if TYPE_CHECKING:
    from vllm_batch_dagster.stages.curation import CurationReport
    from vllm_batch_dagster.stages.push_records import PushRecord
    from vllm_batch_dagster.stages.pushing import PushReport

CURATED_EXPORT = "curated_export"
CURATE_JOB = "curate_batch"
HOURLY = "43 * * * *"
MOST_BATCHES_PER_TICK = 20
OFF = "off: LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY are not both set"
NOT_REVIEWED = "none: the answers of a regression are compared with the gold set"

Metadata = Mapping[str, Any]


def curated_export() -> dg.AssetsDefinition:
    @dg.asset(
        name=CURATED_EXPORT,
        partitions_def=batches,
        deps=["merged_output"],
        group_name="batch",
        kinds={"parquet", "polars"},
        check_specs=checks.curation_check_specs(batches),
    )
    def curate(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> Iterator[object]:
        """The answers by the rules of CURATION_FILE: a Parquet data set for training (`refused_by_rule` says what was
        left out and why), and a selection for review, each row a task in Label Studio where that is set."""
        # Polars is a sixth of the load time, and no other asset needs it.
        from vllm_batch_dagster.stages.curation import curate_batch

        batch = services.store.batches.get(context.partition_key)
        loaded = load_curation_rules(services.settings)
        report = curate_batch(batch, services.store, services.files, services.workspace, loaded.rules)
        rules = {"rules": str(loaded.path or "defaults"), "rules_digest": loaded.digest}
        record, shown = _push(context, services, batch, report)
        yield dg.MaterializeResult(
            metadata={**describe_curation(report), **rules, **shown},
            check_results=[_check(record)],
        )

    return curate


def _push(
    context: dg.AssetExecutionContext, services: Services, batch: Batch, report: "CurationReport"
) -> tuple["PushRecord", Metadata]:
    """Bring the selection to Label Studio, and note beside it how that went. Raises nothing that Label Studio does."""
    from vllm_batch_dagster.stages.curation import review_rows
    from vllm_batch_dagster.stages.push_records import PushRecord, PushState, write_push
    from vllm_batch_dagster.stages.pushing import push_tasks

    is_regression = REGRESSION_OF in (batch.metadata or {})
    state, reason = PushState.OFF, ""
    shown: Metadata = {"label_studio": NOT_REVIEWED if is_regression else OFF}
    if services.settings.pushes_to_label_studio and not is_regression:
        try:
            with open_review_board(services.settings, batch.project_id) as board:
                tasks = (make_task(row) for row in review_rows(report.review_path))
                shown, reason = _describe_push(push_tasks(batch.id, tasks, board, time.sleep))
        except ReviewFailed as failure:
            reason = str(failure)
            shown = {"label_studio": f"failed: {reason}"}
            context.log.warning(f"{batch.id}: {reason}; the schedule curate_schedule tries again")
        state = PushState.FAILED if reason else PushState.DONE
    record = PushRecord(state, services.clock(), reason)
    write_push(report.review_path, record)
    return record, shown


def _describe_push(push: "PushReport") -> tuple[dict[str, Any], str]:
    """Return the metadata of a push that got through, and what is wrong with it all the same."""
    shown: dict[str, Any] = {
        "label_studio": dg.MetadataValue.url(push.url),
        "tasks_added": push.added,
        "tasks_known": push.known,
        "tasks_in_project": push.in_project,
        **({"tasks_renewed": push.renewed} if push.renewed else {}),
        **({"tasks_with_an_older_answer": push.outdated} if push.outdated else {}),
        **({"copies_removed": push.copies} if push.copies else {}),
        **({"failures_survived": push.failures} if push.failures else {}),
    }
    if push.is_whole:
        return shown, ""
    return shown, f"{push.in_project} tasks of the batch are in the project, and {push.expected} were expected"


def _check(record: "PushRecord") -> dg.AssetCheckResult:
    metadata = {"state": record.state.value, **({"reason": record.reason} if record.reason else {})}
    return dg.AssetCheckResult(
        check_name=checks.TASKS_PUSHED,
        passed=not record.reason,
        severity=dg.AssetCheckSeverity.WARN,
        metadata=metadata,
    )


def build_curation() -> tuple[Any, dg.ScheduleDefinition]:
    """Return the job that curates one batch again, and the schedule that asks for it."""
    job = dg.define_asset_job(
        CURATE_JOB,
        selection=dg.AssetSelection.assets(CURATED_EXPORT),
        executor_def=dg.in_process_executor,
        description="Selects from a finished batch again and pushes what is missing in Label Studio. Doubles nothing.",
    )
    return job, _schedule(job)


def _schedule(job: Any) -> dg.ScheduleDefinition:
    @dg.schedule(
        name="curate_schedule",
        job=job,
        cron_schedule=HOURLY,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Every hour: curates again the batches whose selection has not reached Label Studio.",
    )
    def ask(
        context: dg.ScheduleEvaluationContext, services: dg.ResourceParam[Services]
    ) -> list[dg.RunRequest] | dg.SkipReason:
        if not services.settings.pushes_to_label_studio:
            return dg.SkipReason(OFF)
        active = read_active_batches(context.instance).unfinished
        due = islice((each for each in _due(services) if each not in active), MOST_BATCHES_PER_TICK)
        at = int(context.scheduled_execution_time.timestamp())
        wanted = [dg.RunRequest(run_key=f"curate:{batch_id}:{at}", partition_key=batch_id) for batch_id in due]
        return wanted or dg.SkipReason("every selection has reached Label Studio")

    return ask


def _due(services: Services) -> Iterator[str]:
    """Yield the batches to curate again: those of which there is still something to curate."""
    from vllm_batch_dagster.stages.push_records import failed_pushes

    for batch_id in failed_pushes(services.workspace):
        with suppress(NotFound):
            if services.store.batches.get(batch_id).purged_at is None:
                yield batch_id
