"""The pre-flight in the Dagster UI: what `validated_input` shows beside the findings of validation.

Only cheap parts: a sample through the byte index, and the history of the store. A pre-flight that fails never fails the
validation beside which it stands.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from vllm_batch_dagster.core.errors import BatchError
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.preflight import Measurement, describe_run_time, describe_sample
from vllm_batch_dagster.defs.metadata import draw_chart
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.stages.measuring import PreflightBudget, PreflightPorts
from vllm_batch_dagster.stages.preflight import sketch_input

BUDGET = PreflightBudget(sample=500, longest=0, seconds=3.0)


def describe_preflight(batch: Batch, services: Services) -> Mapping[str, Any]:
    """Return the metadata of a valid input."""
    ports = PreflightPorts(services.store, services.files, services.catalog, services.facts, services.clock)
    try:
        measured = sketch_input(batch, ports, services.workspace, BUDGET)
    except (BatchError, OSError) as error:
        return {"preflight": f"not available: {error}"}
    return _describe(measured)


def _describe(measured: Measurement) -> Mapping[str, Any]:
    time = measured.run_time
    notes = [describe_sample(measured), *(f"{load.model}: {load.method}" for load in measured.loads)]
    shown: dict[str, Any] = {"counted_lines": measured.counted, "counted_tokens_in": measured.input_tokens}
    if contexts := [load.context.tokens for load in measured.loads if load.context]:
        shown |= {"max_model_len": min(contexts), "lines_too_long_in_sample": measured.misfit_count}
    if time is not None:
        shown |= {
            "estimated_run_s": round(time.seconds, 1),
            "estimated_run_low_s": round(time.low, 1),
            "estimated_run_high_s": round(time.high, 1),
        }
    notes.append(describe_run_time(measured))
    shown["preflight"] = dg.MetadataValue.md("\n".join(f"- {note}" for note in notes))
    if measured.lengths:
        shown["counted_lengths"] = draw_chart("Tokens per request, of the counted lines", measured.lengths)
    return shown
