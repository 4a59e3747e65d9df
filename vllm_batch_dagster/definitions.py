"""The code location: Dagster's front door. Lists everything that the graph has, by name; opens nothing."""

import dagster as dg

from vllm_batch_dagster.defs.assets import build_assets
from vllm_batch_dagster.defs.curation import build_curation
from vllm_batch_dagster.defs.inbox import build_inbox
from vllm_batch_dagster.defs.jobs import build_jobs
from vllm_batch_dagster.defs.retention import build_retention
from vllm_batch_dagster.defs.reviews import build_review_assets, build_reviews
from vllm_batch_dagster.defs.sensors import build_sensors
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.settings import load_settings


@dg.definitions
def defs() -> dg.Definitions:
    """Build the graph for the settings of this environment."""
    settings = load_settings()
    jobs = build_jobs()
    retention, retention_schedule = build_retention()
    ingest, watch_inbox = build_inbox()
    curate, curate_schedule = build_curation()
    review_jobs, pull_schedule, watch_regressions = build_reviews()
    return dg.Definitions(
        assets=[*build_assets(settings.chunk_slots), *build_review_assets()],
        jobs=[*jobs, retention, ingest, curate, *review_jobs],
        schedules=[retention_schedule, curate_schedule, pull_schedule],
        sensors=[*build_sensors(jobs), watch_inbox, watch_regressions],
        resources={"services": Services(settings)},
        executor=dg.in_process_executor,
    )
