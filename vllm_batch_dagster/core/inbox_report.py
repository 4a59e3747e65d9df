"""Writes what a person finds beside a dropped file: what became of it, and what to do. Markdown that reads as text."""

from collections.abc import Iterator

from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.models import Batch, LineError


def report_accepted(filename: str, batch: Batch) -> str:
    """Return the report of a file that became a batch. Lines that lenient validation left out are counted."""
    rows = [
        f"# {filename} became {batch.id}",
        "",
        f"- endpoint: {batch.endpoint}",
        f"- window: {batch.completion_window}",
        f"- model: {batch.model or 'several, see the lines'}",
        f"- requests: {batch.counts.total}",
    ]
    if batch.rejected:
        rows.append(f"- of these not valid: {batch.rejected} (the batch's error file will say why)")
    rows += ["", f"Follow it: `vllm-batch watch {batch.id}`. Get the results: `vllm-batch download {batch.id}`."]
    return "\n".join(rows) + "\n"


def report_failed(filename: str, batch: Batch) -> str:
    """Return the report of a file whose batch failed validation: every line that is listed on the batch."""
    rows = [
        f"# {filename} was rejected",
        "",
        f"Its lines did not pass validation ({batch.id}); no request was run. Mend them and drop the file again, or",
        "write `validation: lenient` into a .yaml of the same name to run the good lines.",
        "",
    ]
    return "\n".join([*rows, *_describe_errors(batch)]) + "\n"


def _describe_errors(batch: Batch) -> Iterator[str]:
    for error in batch.errors:
        yield _describe_error(error)


def _describe_error(error: LineError) -> str:
    where = f"line {error.line}" if error.line is not None else "the file"
    field = f", {error.param}" if error.param else ""
    return f"- {where}{field}: {error.message} ({error.code})"


def report_refused(filename: str, refusal: InvalidInput) -> str:
    """Return the report of a file of which no batch was made."""
    why = f"{refusal.param}: {refusal.message}" if refusal.param else refusal.message
    return f"# {filename} was rejected\n\n{why}\n\nNo batch was made. Mend this and drop the file again.\n"
