"""What the Dagster UI shows of a batch: numbers with stable names (so that it plots them), links, tables, histograms.

Prompts and answers appear only with UI_SAMPLES: the UI has no authentication (design section 7).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import dagster as dg
import msgspec

from vllm_batch_dagster.core.curation import read_prompt, read_text
from vllm_batch_dagster.core.histogram import Buckets, draw_histogram
from vllm_batch_dagster.core.models import Batch, Chunk, ChunkSummary, LineError, RepairCounts, RequestCounts, Usage
from vllm_batch_dagster.defs.history import EPOCH_METADATA
from vllm_batch_dagster.defs.partitions import cell_key, slot_key
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.stages.inference import ChunkDone
from vllm_batch_dagster.stages.merging import MergeReport
from vllm_batch_dagster.stages.rows import AnsweredLine
from vllm_batch_dagster.stages.validation import ValidationReport

if TYPE_CHECKING:
    from vllm_batch_dagster.stages.curation import CurationReport

SAMPLES = 5
_SAMPLE_CHARACTERS = 200
_ERRORS_SHOWN = 50

Metadata = Mapping[str, Any]


def describe_validation(report: ValidationReport, batch: Batch, services: Services) -> Metadata:
    """Return the metadata of `validated_input`."""
    shown: dict[str, Any] = {
        "requests": report.lines,
        "invalid_lines": report.rejected or len(report.errors),
        "chunks": len(report.chunks),
        "bytes": report.bytes,
        "estimated_tokens_in": report.tokens,
        "endpoint": batch.endpoint,
        **({"model": report.model} if report.model else {}),
        **({"models": _digest("model", dict(report.groups))} if len(report.groups) > 1 else {}),
        "created_at": dg.MetadataValue.timestamp(float(batch.created_at)),
        "expires_at": dg.MetadataValue.timestamp(float(batch.expires_at)),
        "batch": _batch_link(batch.id, services),
        "input_file": _file_link(batch.input_file_id, services),
    }
    if report.chunks:
        shown["chunk_results"] = _chunk_links(batch.id, [chunk.index for chunk in report.chunks])
        shown["merged_output"] = _asset_link("merged_output", batch.id)
    if report.lengths:
        shown["request_lengths"] = draw_chart("Estimated tokens per request", report.lengths)
    if errors := report.errors or report.rejections:
        shown["errors"] = _error_table(errors[:_ERRORS_SHOWN])
    return shown


def describe_chunk(done: ChunkDone, batch: Batch, services: Services, samples: Iterable[AnsweredLine]) -> Metadata:
    """Return the metadata of one chunk of `chunk_results`. The UI keeps this order: long entries come last."""
    summary = done.summary
    shown: dict[str, Any] = {
        **_numbers(summary.counts, summary.usage, summary.inference_seconds, summary.sent_tokens),
        "latency_p50_s": round(summary.latency_p50, 3),
        "latency_p95_s": round(summary.latency_p95, 3),
        "sent": summary.sent,
        "resumed_from_journal": summary.replayed,
        EPOCH_METADATA: done.epoch,
        "batch": _batch_link(batch.id, services),
        "validated_input": _asset_link("validated_input", batch.id),
        "merged_output": _asset_link("merged_output", batch.id),
    }
    if memory := _engine_memory(services):
        shown["engine_memory"] = memory
    shown |= _describe_repairs(summary.repairs)
    if summary.error_codes:
        shown["error_digest"] = _digest("error", summary.error_codes)
    if summary.finish_reasons:
        shown["finish_reasons"] = _digest("finish reason", summary.finish_reasons)
    if summary.input_lengths:
        shown["input_lengths"] = draw_chart("Input tokens per request", summary.input_lengths)
    if summary.output_lengths:
        shown["output_lengths"] = draw_chart("Output tokens per request", summary.output_lengths)
    if rows := [_sample(line) for line in samples]:
        shown["samples"] = dg.MetadataValue.table(records=rows, schema=_SAMPLE_SCHEMA)
    return shown


def _engine_memory(services: Services) -> str:
    """Return the rung of our own engine: what the memory ladder changed of its settings."""
    if services.settings.engine_url:
        return ""
    # It brings an HTTP client along, which loading the graph does not need.
    from vllm_batch_dagster.adapters.engine import engine_rung

    return engine_rung(services.settings.engine_folder)


def _describe_repairs(repairs: RepairCounts) -> Metadata:
    """Return what repair rounds did; nothing where none was needed."""
    return {name: count for name, count in asdict(repairs).items() if repairs != RepairCounts()}


def describe_empty_slot(batch_id: str) -> Metadata:
    """Return the metadata of a chunk slot that the batch does not need."""
    return {"requests": 0, "note": f"{batch_id} needs fewer chunks than there are slots"}


def describe_merge(report: MergeReport, chunks: Iterable[Chunk], services: Services) -> Metadata:
    """Return the metadata of `merged_output`."""
    batch, merged = report.batch, list(chunks)
    shown: dict[str, Any] = {
        "status": batch.status.value,
        **_numbers(report.counts, report.usage, report.inference_seconds, report.usage.total_tokens),
        "wall_s": _wall_seconds(batch),
        **(_describe_repairs(batch.repairs) if batch.repairs else {}),
    }
    for name, file in (("output_file", report.output), ("error_file", report.errors)):
        if file is not None:
            shown[name] = _file_link(file.id, services)
            shown[f"{name}_bytes"] = file.bytes
    shown |= {
        "batch": _batch_link(batch.id, services),
        "validated_input": _asset_link("validated_input", batch.id),
        "chunk_results": _chunk_links(batch.id, [chunk.index for chunk in merged]),
        "curated_export": _asset_link("curated_export", batch.id),
        "chunks": dg.MetadataValue.table(records=[_chunk_row(chunk) for chunk in merged], schema=_CHUNK_SCHEMA),
    }
    if report.finish_reasons:
        shown["finish_reasons"] = _digest("finish reason", report.finish_reasons)
    if report.output_lengths:
        shown["output_lengths"] = draw_chart("Output tokens per request", report.output_lengths)
    return shown


def describe_curation(report: "CurationReport") -> Metadata:
    """Return the metadata of `curated_export`."""
    return {
        "rows": report.kept,
        "refused": sum(report.refused.values()),
        "bytes": report.bytes,
        "dataset": dg.MetadataValue.path(str(report.path)),
        "refused_by_rule": _digest("rule", report.refused) if report.refused else "nothing refused",
        "selected": report.selected,
        "selected_by_rule": _digest("rule", report.selected_by_rule) if report.selected else "nothing selected",
        "selection": dg.MetadataValue.path(str(report.review_path)),
    }


def _numbers(counts: RequestCounts, usage: Usage, seconds: float, tokens: int) -> dict[str, Any]:
    """`tokens` are those of the `seconds`: a resumed chunk holds answers of earlier attempts too."""
    return {
        "requests": counts.total,
        "completed": counts.completed,
        "errors": counts.failed,
        "error_rate": round(counts.failed / counts.total, 4) if counts.total else 0.0,
        "tokens_in": usage.input_tokens,
        "tokens_out": usage.output_tokens,
        "tokens_per_s": round(tokens / seconds, 1) if seconds > 0 else 0.0,
        "duration_s": round(seconds, 3),
    }


def _batch_link(batch_id: str, services: Services) -> dg.MarkdownMetadataValue:
    return _link(batch_id, f"{services.api_url}/v1/batches/{batch_id}")


def _file_link(file_id: str, services: Services) -> dg.MarkdownMetadataValue:
    return _link(file_id, f"{services.api_url}/v1/files/{file_id}/content")


def _asset_link(asset: str, batch_id: str) -> dg.MarkdownMetadataValue:
    return _link(f"{asset} of this batch", _asset_path(asset, batch_id))


def _chunk_links(batch_id: str, indexes: Iterable[int]) -> dg.MarkdownMetadataValue:
    """Return a link to each chunk. Cells of a table cannot be links."""
    cells = ((slot_key(index), _asset_path("chunk_results", str(cell_key(batch_id, index)))) for index in indexes)
    return dg.MetadataValue.md(" ".join(f"[{chunk}]({path})" for chunk, path in cells))


def _asset_path(asset: str, partition: str) -> str:
    """Return the page of a partition without a host, so that it also works through a tunnel or a proxy."""
    return f"/assets/{asset}?view=partitions&partition={quote(partition)}"


def _link(text: str, target: str) -> dg.MarkdownMetadataValue:
    """Return a link with a short text: a bare URL cannot wrap, and pushes the tables below it out of the pane."""
    return dg.MetadataValue.md(f"[{text}]({target})")


def _chunk_row(chunk: Chunk) -> dg.TableRecord:
    summary = chunk.summary or ChunkSummary(RequestCounts(), Usage())
    numbers = _numbers(summary.counts, summary.usage, summary.inference_seconds, summary.sent_tokens)
    return dg.TableRecord(
        {
            "chunk": slot_key(chunk.index),
            **{name: numbers[name] for name in ("requests", "errors", "tokens_out", "tokens_per_s", "duration_s")},
            "attempt": chunk.published_epoch,
        }
    )


def _wall_seconds(batch: Batch) -> int:
    ended = batch.completed_at or batch.cancelled_at or batch.expired_at or batch.created_at
    return ended - batch.created_at


def draw_chart(title: str, buckets: Buckets) -> dg.MarkdownMetadataValue:
    """Return a histogram under a title."""
    return dg.MetadataValue.md(f"{title}\n\n```\n{draw_histogram(buckets)}\n```")


def _digest(name: str, counts: Mapping[str, int]) -> dg.MarkdownMetadataValue:
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
    return dg.MetadataValue.table(records=rows, schema=_ERROR_SCHEMA)


def _sample(line: AnsweredLine) -> dg.TableRecord:
    """Return the row of one line. Three columns, because the pane is narrow: a failed line tells its status as text."""
    said = _read_object(line.record.body)
    answer = read_text(said) if line.record.ok else f"error {line.record.status}: {_error_message(said)}"
    return dg.TableRecord(
        {
            "custom_id": line.record.custom_id,
            "prompt": _shorten(read_prompt(_read_object(line.request))),
            "answer": _shorten(answer),
        }
    )


def _read_object(body: bytes | msgspec.Raw) -> dict[str, Any]:
    """Return the decoded object, empty when Python cannot hold it (1e999): a sample must never fail its chunk."""
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


def _error_message(said: Mapping[str, Any]) -> str:
    error = said.get("error")
    return str(error.get("message", "")) if isinstance(error, dict) else str(said.get("message", ""))


def _shorten(text: str) -> str:
    return text if len(text) <= _SAMPLE_CHARACTERS else text[: _SAMPLE_CHARACTERS - 1].rstrip() + "…"


def _schema(*columns: tuple[str, str, str]) -> dg.TableSchema:
    """Return a schema of (name, type, description): what the UI shows behind "Show schema"."""
    return dg.TableSchema([dg.TableColumn(name, kind, description) for name, kind, description in columns])


_SAMPLE_SCHEMA = _schema(
    ("custom_id", "string", "As the input line has it."),
    ("prompt", "string", f"The last message or input, at most {_SAMPLE_CHARACTERS} characters."),
    ("answer", "string", "The text of the answer, or the error; shortened in the same way."),
)
_CHUNK_SCHEMA = _schema(
    ("chunk", "string", "The chunk's key in chunk_results."),
    ("requests", "int", "Lines of the chunk."),
    ("errors", "int", "Lines that ended in the error file."),
    ("tokens_out", "int", "Output tokens, as the engine counted them."),
    ("tokens_per_s", "float", "Input and output tokens per second."),
    ("duration_s", "float", "From the first request to the last answer."),
    ("attempt", "int", "The attempt whose answers were merged."),
)
_ERROR_SCHEMA = _schema(
    ("line", "int", "Counted from 1; 0 for the whole file."),
    ("code", "string", "OpenAI's error code."),
    ("param", "string", "The key that is wrong."),
    ("message", "string", "What is wrong, and where."),
)
