"""The `retention` job and its schedule: deletes what has expired or ended long ago, in the store, on disk, in Dagster.

The rules are in core/retention.py, the order of effects in stages/retention.py. The schedule looks every hour and asks
for a run only when something is due, and once a day in any case, to look for contents without a record.
"""

from datetime import UTC
from typing import Any

import dagster as dg

from vllm_batch_dagster.composition import build_disk, retention_rules
from vllm_batch_dagster.core.retention import STAYS, Kind, RetentionReport
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.stages.retention import Retention, RetentionPorts

RETENTION_JOB = "retention"
HOURLY = "17 * * * *"
DAILY_HOUR = 3  # UTC


class RetentionConfig(dg.Config):
    """What a person may choose in the launchpad."""

    dry_run: bool = False


def build_retention() -> tuple[dg.JobDefinition, dg.ScheduleDefinition]:
    job = _job()
    return job, _schedule(job)


def _job() -> dg.JobDefinition:
    @dg.op(name="delete_expired", out=dg.Out(dg.Nothing))
    def delete_expired(
        context: dg.OpExecutionContext, config: RetentionConfig, services: dg.ResourceParam[Services]
    ) -> Any:
        """Delete expired files and uploads, the working data of batches past BATCH_RETENTION_DAYS with their runs, and
        leftovers of processes that died."""
        report = retention(services, context.instance, dry_run=config.dry_run).run()
        for kind, tally in report.tallies.items():
            context.log.info(f"{kind.value}: {tally.count}, {tally.bytes} bytes: {', '.join(tally.names)}")
        context.add_output_metadata(describe_retention(report))
        if report.of(Kind.REFUSED).count:
            raise dg.Failure("some files could not be removed: see the log of this run; the rest was done")

    @dg.job(
        name=RETENTION_JOB,
        executor_def=dg.in_process_executor,
        description="Deletes what has expired or ended long ago. `vllm-batch gc --dry-run` shows what would go.",
    )
    def retention_job() -> None:
        delete_expired()

    return retention_job


def _schedule(job: dg.JobDefinition) -> dg.ScheduleDefinition:
    @dg.schedule(
        name="retention_schedule",
        job=job,
        cron_schedule=HOURLY,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Every hour when something has expired, and once a day to look for leftovers.",
    )
    def ask(
        context: dg.ScheduleEvaluationContext, services: dg.ResourceParam[Services]
    ) -> dg.RunRequest | dg.SkipReason:
        at = context.scheduled_execution_time
        if at.astimezone(UTC).hour != DAILY_HOUR:
            due = retention(services, context.instance, dry_run=True).remove_due()
            if due.is_empty:
                return dg.SkipReason("nothing has expired")
        return dg.RunRequest(run_key=f"retention:{int(at.timestamp())}")

    return ask


def retention(services: Services, instance: dg.DagsterInstance, *, dry_run: bool) -> Retention:
    """Return a pass over the stores of `services` and over `instance`."""
    # SQLAlchemy comes with it, and no process that only loads the graph needs that.
    from vllm_batch_dagster.defs.purge import DagsterHistory

    settings = services.settings
    graph = DagsterHistory(instance, settings.chunk_slots)
    ports = RetentionPorts(services.store, services.files, build_disk(settings), graph, services.clock)
    return Retention(ports, retention_rules(settings), dry_run=dry_run)


def describe_retention(report: RetentionReport) -> dict[str, dg.MetadataValue[Any]]:
    """Return what the page of a run shows: a number per kind that was found, and the bytes together."""
    shown: dict[str, dg.MetadataValue[Any]] = {"bytes_freed": dg.MetadataValue.int(report.bytes_freed)}
    for kind, tally in report.tallies.items():
        if tally.count:
            label = kind.value if kind in STAYS else f"removed {kind.value}"
            shown[label] = dg.MetadataValue.int(tally.count)
    return shown
