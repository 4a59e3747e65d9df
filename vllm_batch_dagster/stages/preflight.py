"""Looks at an input before any engine time is spent: bad lines, tokens against the context, repeats, run time.

Called by POST /v1/batches/validate, which leaves no trace, and by the `validated_input` asset for its metadata. Bad
lines are those of validation itself. Tokens of a large file are counted on a sample.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import Workspace
from vllm_batch_dagster.core.preflight import Measurement
from vllm_batch_dagster.stages.measuring import Measuring, PreflightBudget, PreflightPorts
from vllm_batch_dagster.stages.quotas import refuse_queue
from vllm_batch_dagster.stages.survey import survey_file, survey_index
from vllm_batch_dagster.stages.validation import ValidationLimits, ValidationReport, inspect_input


@dataclass(frozen=True, slots=True)
class Preflight:
    """`measurement` None: there is no file to look at."""

    report: ValidationReport
    measurement: Measurement | None


def inspect_batch(batch: Batch, ports: PreflightPorts, limits: ValidationLimits, budget: PreflightBudget) -> Preflight:
    """Validate and measure the input of a batch that is not stored. Nothing is left of it.

    Raises StorageFailure, and EngineUnavailable when the servers behind ENGINE_URL cannot say what they serve.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-batch-") as folder:
        scratch = _Scratch(Path(folder))
        report = inspect_input(batch, ports.store, ports.files, scratch, ports.catalog, limits, ports.clock)
    if not report.errors:
        lines = report.lines - report.rejected
        refusal = refuse_queue(batch.project_id, lines, limits.max_queued_lines, ports.store)
        report = replace(report, errors=(refusal,)) if refusal else report
    elif any(error.line is None for error in report.errors):
        return Preflight(report, None)  # an error of the whole file: it is missing, empty or too long
    try:
        record, source = ports.store.files.get(batch.input_file_id), ports.files.open(batch.input_file_id)
    except NotFound:  # deleted since
        return Preflight(report, None)
    with source:
        survey = survey_file(source, record.sha256, budget.sample, budget.longest)
        return Preflight(report, Measuring(ports, budget).run(survey, source))


def sketch_input(batch: Batch, ports: PreflightPorts, workspace: Workspace, budget: PreflightBudget) -> Measurement:
    """Measure a sample of a validated batch through its byte index, without a second walk over the file."""
    with workspace.index_path(batch.id).open("rb") as index, ports.files.open(batch.input_file_id) as source:
        return Measuring(ports, budget).run(survey_index(index, batch.id, budget.sample), source)


class _Scratch(Workspace):
    """A workspace in a folder that goes away. Validation writes its byte index there, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def index_path(self, batch_id: str) -> Path:
        return self._folder / "index.bin"

    def journal_path(self, batch_id: str, chunk: int, epoch: int) -> Path:
        return self._folder / f"{chunk}.{epoch}.jsonl"

    def result_path(self, batch_id: str, chunk: int, epoch: int) -> Path:
        return self._folder / f"{chunk}.{epoch}.idx"

    def suspects_path(self, batch_id: str) -> Path:
        return self._folder / "suspects.json"

    def dataset_path(self, name: str, batch_id: str) -> Path:
        return self._folder / name
