"""The drop folder in the graph: a sensor that looks at it, and the job that turns what was dropped into batches.

The sensor's tick only looks and moves folders; bytes are copied in a run, which may take as long as it needs. What is
taken when, and how nothing is taken twice, is in stages/inbox.py.
"""

import secrets
from typing import Any

import dagster as dg

from vllm_batch_dagster.composition import allowed_hosts, build_drop_folder
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.stages.inbox import STUCK, InboxPorts, InboxTally, ingest, settle

INGEST_JOB = "ingest_inbox"
_UNFINISHED = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
)


def build_inbox() -> tuple[dg.JobDefinition, dg.SensorDefinition]:
    job = _job()
    return job, _sensor(job)


def _job() -> dg.JobDefinition:
    @dg.op(name="ingest_drops", out=dg.Out(dg.Nothing))
    def ingest_drops(context: dg.OpExecutionContext, services: dg.ResourceParam[Services]) -> None:
        """Make a batch of every dropped file that is whole. What was wrong with a file is in the report beside it."""
        tally = ingest(inbox_ports(services), context.log.info)
        context.add_output_metadata(describe_tally(tally))
        if STUCK in tally.counts:
            raise dg.Failure(f"{tally.describe()}: {'; '.join(tally.named[STUCK])}. They are tried again")

    @dg.job(
        name=INGEST_JOB,
        executor_def=dg.in_process_executor,
        description="Makes batches of the files in INBOX_FOLDER. Asked for by the sensor `watch_inbox`.",
    )
    def ingest_inbox() -> None:
        ingest_drops()

    return ingest_inbox


def _sensor(job: dg.JobDefinition) -> dg.SensorDefinition:
    @dg.sensor(
        name="watch_inbox",
        job=job,
        minimum_interval_seconds=5,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Looks for dropped files in INBOX_FOLDER, and moves the judged ones to done/ or rejected/.",
    )
    def watch_inbox(
        context: dg.SensorEvaluationContext, services: dg.ResourceParam[Services]
    ) -> dg.RunRequest | dg.SkipReason:
        tally = settle(inbox_ports(services))
        if not tally.is_due:
            return dg.SkipReason(f"the inbox: {tally.describe()}")
        if context.instance.get_run_ids(dg.RunsFilter(job_name=INGEST_JOB, statuses=list(_UNFINISHED)), limit=1):
            return dg.SkipReason("files were dropped; a run is about to take them")
        return dg.RunRequest()

    return watch_inbox


def inbox_ports(services: Services) -> InboxPorts:
    settings = services.settings
    return InboxPorts(
        folder=build_drop_folder(settings),
        store=services.store,
        files=services.files,
        clock=services.clock,
        randomness=secrets.token_bytes,
        max_bytes=settings.max_file_bytes,
        windows=settings.completion_windows,
        webhook_hosts=allowed_hosts(settings),
    )


def describe_tally(tally: InboxTally) -> dict[str, dg.MetadataValue[Any]]:
    """Return what the page of a run shows: a number and the first names of each kind."""
    shown: dict[str, dg.MetadataValue[Any]] = {}
    for what, count in tally.counts.items():
        shown[what] = dg.MetadataValue.int(count)
        shown[f"{what}: names"] = dg.MetadataValue.json(tally.named[what])
    return shown
