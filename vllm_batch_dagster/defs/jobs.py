"""The four jobs that the sensor asks for. All run in one process: a step process would cost 2.5 s more per run."""

from typing import Any, TypeAlias

import dagster as dg

from vllm_batch_dagster.core.reconciling import Step

JOB_OF = {
    Step.VALIDATE: "validate_batch",
    Step.INFER: "infer_chunks",
    Step.FINALIZE: "finalize_batch",
    Step.DELIVER: "deliver_batch",
}
# Jobs with the asset `deliveries`: at the end of a merge at once, for whatever is due later in a run of its own.
DELIVERING = (JOB_OF[Step.FINALIZE], JOB_OF[Step.DELIVER])

# What define_asset_job returns has no public name.
AssetJob: TypeAlias = Any

# A chunk whose engine failed is retried by Dagster; what the journals hold is not sent again. So are the steps behind
# a merge: the batch has ended by then, and the sensor looks only at what is open. Only the failed step runs again.
_RETRY_FAILURES = {"dagster/retry_on_asset_or_op_failure": "true", "dagster/max_retries": "2"}


def build_jobs() -> list[AssetJob]:
    return [
        _job(Step.VALIDATE, ["validated_input"]),
        _job(Step.INFER, ["chunk_results"], _RETRY_FAILURES),
        _job(Step.FINALIZE, ["merged_output", "deliveries", "curated_export"], _RETRY_FAILURES),
        _job(Step.DELIVER, ["deliveries"]),
    ]


def _job(step: Step, assets: list[str], tags: dict[str, str] | None = None) -> AssetJob:
    return dg.define_asset_job(
        JOB_OF[step],
        selection=dg.AssetSelection.assets(*assets),
        executor_def=dg.in_process_executor,
        tags=tags,
    )
