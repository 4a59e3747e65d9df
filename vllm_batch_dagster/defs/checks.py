"""Asset checks: what must hold of the input, of each chunk and of the merged files. Evaluated by the assets themselves,
because a check step of its own is skipped in range runs (dagster report section 4).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence

import dagster as dg

from vllm_batch_dagster.core.deliveries import DeliveryRecord, DeliveryState
from vllm_batch_dagster.core.errors import UnprovenMerge
from vllm_batch_dagster.core.merging import ENGINE_FAILURE
from vllm_batch_dagster.defs.history import CHUNK_RESULTS
from vllm_batch_dagster.stages.inference import ChunkDone
from vllm_batch_dagster.stages.merging import MergeReport
from vllm_batch_dagster.stages.validation import ValidationReport

ERROR_RATE_LIMIT = 0.1

LINES_VALID = dg.AssetCheckSpec(
    "lines_valid", asset="validated_input", description="Every line of the input file may run."
)
COUNTS_CONSERVED = dg.AssetCheckSpec(
    "counts_conserved",
    asset="merged_output",
    description="Lines of the output file and of the error file add up to the lines of the input.",
)
CUSTOM_IDS_ONCE = dg.AssetCheckSpec(
    "custom_ids_once",
    asset="merged_output",
    description="Every custom_id of the input stands exactly once in the merged files, in input order.",
)
HANDLERS_DELIVERED, WEBHOOKS_DELIVERED = "handlers_delivered", "webhooks_delivered"
TASKS_PUSHED = "tasks_pushed"
_EVERY_LINE_ANSWERED, _ERROR_RATE = "every_line_answered", "error_rate"


def chunk_check_specs(cells: dg.PartitionsDefinition) -> list[dg.AssetCheckSpec]:
    """Return the checks that exist for each chunk."""
    described = {
        _EVERY_LINE_ANSWERED: "The engine answered every line of the chunk, if only with an error.",
        _ERROR_RATE: f"At most {ERROR_RATE_LIMIT:.0%} of the chunk's lines ended in an error.",
    }
    return _partitioned_specs(CHUNK_RESULTS, cells, described)


def delivery_check_specs(batches: dg.PartitionsDefinition) -> list[dg.AssetCheckSpec]:
    """Return the checks that exist for the deliveries of each batch."""
    described = {
        HANDLERS_DELIVERED: "Every result handler of the batch has taken its results.",
        WEBHOOKS_DELIVERED: "Every webhook of the batch has been told of its end.",
    }
    return _partitioned_specs(dg.AssetKey("deliveries"), batches, described)


def curation_check_specs(batches: dg.PartitionsDefinition) -> list[dg.AssetCheckSpec]:
    """Return the check that exists for the curation of each batch."""
    described = {TASKS_PUSHED: "Every row that was selected for review is one task in Label Studio, if that is set."}
    return _partitioned_specs(dg.AssetKey("curated_export"), batches, described)


def deliveries_check(name: str, shown: Sequence[DeliveryRecord]) -> dg.AssetCheckResult:
    """Return the check of the targets of one kind: a warning while there are attempts to come, an error when one is
    dead."""
    waiting = [each for each in shown if each.state is DeliveryState.PENDING]
    dead = [each for each in shown if each.state is DeliveryState.DEAD]
    problems = {each.target: each.last_error or "not attempted yet" for each in (*dead, *waiting)}
    return dg.AssetCheckResult(
        check_name=name,
        passed=not problems,
        severity=dg.AssetCheckSeverity.ERROR if dead else dg.AssetCheckSeverity.WARN,
        metadata={
            "delivered": len(shown) - len(waiting) - len(dead),
            "waiting": len(waiting),
            "dead": len(dead),
            "problems": dg.MetadataValue.json(problems),
        },
    )


def _partitioned_specs(
    asset: dg.AssetKey, partitions: dg.PartitionsDefinition, described: Mapping[str, str]
) -> list[dg.AssetCheckSpec]:
    with warnings.catch_warnings():
        # Checks by partition are a preview of Dagster's; its version is pinned, and tests/defs guards them.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return [
            dg.AssetCheckSpec(name, asset=asset, partitions_def=partitions, description=text)
            for name, text in described.items()
        ]


def lines_valid(report: ValidationReport) -> dg.AssetCheckResult:
    """Return the check of an input: bad lines beside which the others run (lenient mode) are a warning only."""
    errors = report.errors or report.rejections
    return dg.AssetCheckResult(
        check_name=LINES_VALID.name,
        passed=not errors,
        severity=dg.AssetCheckSeverity.WARN if report.rejected else dg.AssetCheckSeverity.ERROR,
        metadata={
            "invalid_lines": report.rejected or len(errors),
            "first_error": errors[0].message if errors else "",
        },
    )


def chunk_checks(done: ChunkDone, cell: dg.MultiPartitionKey) -> Iterator[dg.AssetCheckEvaluation]:
    """Yield the evaluations of one chunk."""
    counts = done.summary.counts
    unanswered = done.summary.error_codes.get(ENGINE_FAILURE, 0)
    rate = counts.failed / counts.total if counts.total else 0.0
    yield dg.AssetCheckEvaluation(
        asset_key=CHUNK_RESULTS,
        check_name=_EVERY_LINE_ANSWERED,
        passed=unanswered == 0,
        partition=cell,
        metadata={"unanswered": unanswered},
    )
    yield dg.AssetCheckEvaluation(
        asset_key=CHUNK_RESULTS,
        check_name=_ERROR_RATE,
        passed=rate <= ERROR_RATE_LIMIT,
        severity=dg.AssetCheckSeverity.WARN,
        partition=cell,
        metadata={"error_rate": round(rate, 4)},
    )


def refused_merge(error: UnprovenMerge) -> dg.AssetCheckResult:
    """Return the failed check of a merge that was not published."""
    return dg.AssetCheckResult(check_name=CUSTOM_IDS_ONCE.name, passed=False, metadata={"problem": error.problem})


def merge_checks(report: MergeReport) -> Sequence[dg.AssetCheckResult]:
    """Return the results for merged files: from the walk over the files themselves, not from our own counters."""
    tally, counts = report.tally, report.counts
    conserved = (
        tally.output_lines == counts.completed
        and tally.error_lines == counts.failed
        and tally.output_lines + tally.error_lines == counts.total
    )
    return [
        dg.AssetCheckResult(
            check_name=COUNTS_CONSERVED.name,
            passed=conserved,
            metadata={
                "requests": counts.total,
                "output_lines": tally.output_lines,
                "error_lines": tally.error_lines,
            },
        ),
        dg.AssetCheckResult(
            check_name=CUSTOM_IDS_ONCE.name,
            # A merge with a problem is refused before it comes here: see refused_merge.
            passed=not tally.problem,
            metadata={"requests": counts.total, "problem": "none"},
        ),
    ]
