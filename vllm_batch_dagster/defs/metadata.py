"""What the Dagster UI shows of a batch: numbers with stable names (so that it plots them), links, tables, a histogram.

Prompts and answers appear only with UI_SAMPLES: the UI has no authentication (design section 7).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

from vllm_batch_dagster.core.curation import read_prompt, read_text
from vllm_batch_dagster.core.histogram import Buckets, draw_histogram
from vllm_batch_dagster.core.models import Batch, Chunk, ChunkSummary, LineError, RequestCounts, Usage
from vllm_batch_dagster.defs.history import EPOCH_METADATA
from vllm_batch_dagster.defs.partitions import cell_key
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.stages.curation import CurationReport
from vllm_batch_dagster.stages.inference import ChunkDone
from vllm_batch_dagster.stages.merging import MergeReport
from vllm_batch_dagster.stages.rows import AnsweredLine
from vllm_batch_dagster.stages.validation import ValidationReport

SAMPLES = 8
_SAMPLE_CHARACTERS = 300
_ERRORS_SHOWN = 50

Metadata = Mapping[str, Any]


def describe_validation(report: ValidationReport, batch: Batch, services: Services) -> Metadata:
    """Return the metadata of `validated_input`."""
    shown: dict[str, Any] = {
        "requests": report.lines,
        "bytes": report.bytes,
        "chunks": len(report.chunks),
        "invalid_lines": len(report.errors),
        "estimated_tokens_in": sum(bucket * count for bucket, count in report.lengths),
        **_links(batch.id, services),
    }
    if report.model:
        shown["model"] = report.model
    if report.lengths:
        shown["request_lengths"] = _chart("Estimated tokens per request", report.lengths)
    if report.errors:
        shown["errors"] = _error_table(report.errors[:_ERRORS_SHOWN])
    return shown


def describe_chunk(done: ChunkDone, batch: Batch, services: Services, samples: Iterable[AnsweredLine]) -> Metadata:
    """Return the metadata of one chunk of `chunk_results`."""
    summary = done.summary
    shown: dict[str, Any] = {
        EPOCH_METADATA: done.epoch,
        **_numbers(summary.counts, summary.usage, summary.inference_seconds),
        "latency_p50_s": summary.latency_p50,
        "latency_p95_s": summary.latency_p95,
        "sent": summary.sent,
        "resumed_from_journal": summary.replayed,
        **_links(batch.id, services),
        "merged_output": dg.MetadataValue.url(_asset_url(services, "merged_output", batch.id)),
    }
    if summary.output_lengths:
        shown["input_lengths"] = _chart("Input tokens", summary.input_lengths)
        shown["output_lengths"] = _chart("Output tokens", summary.output_lengths)
    if summary.error_codes:
        shown["error_digest"] = _digest("error", summary.error_codes)
    if summary.finish_reasons:
        shown["finish_reasons"] = _digest("finish reason", summary.finish_reasons)
    if rows := [_sample(line) for line in samples]:
        shown["samples"] = dg.MetadataValue.table(records=rows)
    return shown


def describe_empty_slot(batch_id: str) -> Metadata:
    """Return the metadata of a chunk slot that the batch does not need."""
    return {"requests": 0, "note": f"{batch_id} needs fewer chunks than there are slots"}


def describe_merge(report: MergeReport, chunks: Iterable[Chunk], services: Services) -> Metadata:
    """Return the metadata of `merged_output`."""
    batch = report.batch
    shown: dict[str, Any] = {
        "status": batch.status.value,
        **_numbers(report.counts, report.usage, report.inference_seconds),
        "wall_s": _wall_seconds(batch),
        **_links(batch.id, services),
        "chunks": dg.MetadataValue.table(records=[_chunk_row(chunk, services) for chunk in chunks]),
        "finish_reasons": _digest("finish reason", report.finish_reasons),
    }
    for name, file in (("output_file", report.output), ("error_file", report.errors)):
        if file is not None:
            shown[name] = dg.MetadataValue.url(f"{services.api_url}/v1/files/{file.id}/content")
            shown[f"{name}_bytes"] = file.bytes
    if report.output_lengths:
        shown["output_lengths"] = _chart("Output tokens", report.output_lengths)
    return {key: value for key, value in shown.items() if value != ""}


def describe_curation(report: CurationReport) -> Metadata:
    """Return the metadata of `curated_export`."""
    return {
        "rows": report.kept,
        "refused": sum(report.refused.values()),
        "bytes": report.bytes,
        "dataset": dg.MetadataValue.path(str(report.path)),
        "refused_by_rule": _digest("rule", report.refused) or "nothing refused",
    }


def _numbers(counts: RequestCounts, usage: Usage, seconds: float) -> dict[str, Any]:
    return {
        "requests": counts.total,
        "completed": counts.completed,
        "errors": counts.failed,
        "error_rate": round(counts.failed / counts.total, 4) if counts.total else 0.0,
        "tokens_in": usage.input_tokens,
        "tokens_out": usage.output_tokens,
        "tokens_per_s": round(usage.total_tokens / seconds, 1) if seconds > 0 else 0.0,
        "duration_s": round(seconds, 3),
    }


def _links(batch_id: str, services: Services) -> dict[str, Any]:
    return {
        "batch": dg.MetadataValue.url(f"{services.api_url}/v1/batches/{batch_id}"),
        "validated_input": dg.MetadataValue.url(_asset_url(services, "validated_input", batch_id)),
    }


def _asset_url(services: Services, asset: str, partition: str) -> str:
    return f"{services.dagster_url}/assets/{asset}?view=partitions&partition={partition}"


def _chunk_row(chunk: Chunk, services: Services) -> dg.TableRecord:
    summary = chunk.summary or ChunkSummary(RequestCounts(), Usage())
    return dg.TableRecord(
        {
            "chunk": f"{chunk.index:04d}",
            "requests": summary.counts.total,
            "errors": summary.counts.failed,
            "tokens_out": summary.usage.output_tokens,
            "duration_s": summary.inference_seconds,
            "attempt": chunk.published_epoch,
            "link": _asset_url(services, "chunk_results", str(cell_key(chunk.batch_id, chunk.index))),
        }
    )


def _wall_seconds(batch: Batch) -> int:
    ended = batch.completed_at or batch.cancelled_at or batch.expired_at or batch.created_at
    return ended - batch.created_at


def _chart(title: str, buckets: Buckets) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(f"{title}\n\n```\n{draw_histogram(buckets)}\n```")


def _digest(name: str, counts: Mapping[str, int]) -> Any:
    if not counts:
        return ""
    rows = "\n".join(f"| {key} | {count} |" for key, count in sorted(counts.items(), key=lambda item: -item[1]))
    return dg.MetadataValue.md(f"| {name} | count |\n|---|---|\n{rows}")


def _error_table(errors: Iterable[LineError]) -> dg.TableMetadataValue:
    rows = [
        dg.TableRecord(
            {
                "line": error.line or 0,
                "code": error.code,
                "param": error.param or "",
                "message": error.message,
            }
        )
        for error in errors
    ]
    return dg.MetadataValue.table(records=rows)


def _sample(line: AnsweredLine) -> dg.TableRecord:
    import msgspec

    asked = msgspec.json.decode(line.request)
    said = msgspec.json.decode(line.record.body)
    answer = read_text(said) if line.record.ok else str(said.get("error", {}).get("message", ""))
    return dg.TableRecord(
        {
            "custom_id": line.record.custom_id,
            "prompt": read_prompt(asked)[:_SAMPLE_CHARACTERS],
            "answer": answer[:_SAMPLE_CHARACTERS],
            "status": line.record.status,
            "seconds": line.record.seconds,
        }
    )
