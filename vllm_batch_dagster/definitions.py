"""The code location: Dagster's front door. Lists everything that the graph has, by name; opens nothing."""

import dagster as dg

from vllm_batch_dagster.defs.assets import build_assets
from vllm_batch_dagster.defs.jobs import build_jobs
from vllm_batch_dagster.defs.retention import build_retention
from vllm_batch_dagster.defs.sensors import build_sensors
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.settings import load_settings


@dg.definitions
def defs() -> dg.Definitions:
    """Build the graph for the settings of this environment."""
    settings = load_settings()
    jobs = build_jobs()
    retention, retention_schedule = build_retention()
    return dg.Definitions(
        assets=build_assets(settings.chunk_slots),
        jobs=[*jobs, retention],
        schedules=[retention_schedule],
        sensors=build_sensors(jobs),
        resources={"services": Services(settings)},
        executor=dg.in_process_executor,
    )
