"""What the Dagster UI shows of the way back: numbers with stable names, where the files are, and a chart of the scores.

Prompts and answers appear only with UI_SAMPLES: the UI has no authentication (design section 7).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from vllm_batch_dagster.core.agreement import draw_spread
from vllm_batch_dagster.defs.services import Services

if TYPE_CHECKING:
    from vllm_batch_dagster.stages.gold_sets import GoldCounts
    from vllm_batch_dagster.stages.pulling import PullReport
    from vllm_batch_dagster.stages.regression import RegressionReport, ScoreRow, Started
    from vllm_batch_dagster.stages.review_counts import ReviewCounts
    from vllm_batch_dagster.stages.training_sets import SetCounts
    from vllm_batch_dagster.stages.versions import Version

_SHOWN_CHARACTERS = 120


def describe_pull(
    reports: "Sequence[tuple[str, PullReport]]", counts: "ReviewCounts", folder: Path, off: str
) -> dict[str, Any]:
    """Return the metadata of `reviewed_items`. `off` is shown when there was nothing to pull from."""
    pulls = [report for _url, report in reports]
    shown: dict[str, Any] = {
        "items": counts.items,
        "annotations": counts.annotations,
        "versions": counts.versions,
        "new_versions": sum(report.new.total() for report in pulls),
        "tasks_looked_at": sum(report.tasks for report in pulls),
        "skipped": counts.by_state.get("skipped", 0),
        "withdrawn": counts.by_state.get("withdrawn", 0),
        "reviewed_by_several": counts.shared,
        "dataset": dg.MetadataValue.path(str(folder)),
        "label_studio": dg.MetadataValue.md(" ".join(f"[{url}]({url})" for url, _report in reports) or off),
    }
    if counts.shared:
        shown["agreement"] = round(counts.agreed / counts.shared, 4)
    if foreign := sum(report.foreign for report in pulls):
        shown["tasks_of_others"] = foreign
    if unreadable := sum(report.unreadable for report in pulls):
        shown["unreadable_annotations"] = unreadable
    return shown | {
        "verdicts": _table("verdict", counts.by_verdict),
        "ratings": _table("rating", counts.by_rating),
    }


def describe_training_set(version: "Version", counts: "SetCounts") -> dict[str, Any]:
    """Return the metadata of `training_dataset`."""
    return {
        "items": counts.items,
        "judged": counts.judged,
        **{f"{name}_lines": count for name, count in counts.lines.items()},
        **_describe_version(version),
        "unsettled": _table("reason", counts.unsettled),
        **{f"no_{name}_line": _table("reason", dropped) for name, dropped in counts.dropped.items()},
    }


def describe_gold_set(version: "Version", counts: "GoldCounts") -> dict[str, Any]:
    """Return the metadata of `gold_set`."""
    return {
        "items": counts.items,
        "left_out": counts.left_out.total(),
        **_describe_version(version),
        "verdicts": _table("verdict", counts.by_verdict),
        "models": _table("model", counts.by_model),
        "left_out_by_reason": _table("reason", counts.left_out),
    }


def _describe_version(version: "Version") -> dict[str, Any]:
    return {
        "version": version.id,
        "is_new": version.is_new,
        "bytes": version.bytes,
        "dataset": dg.MetadataValue.path(str(version.path)),
    }


def describe_started(started: "Sequence[Started]", services: Services) -> dict[str, Any]:
    """Return the metadata of a run of `regression_batch`."""
    links = " ".join(f"[{each.batch_id}]({services.api_url}/v1/batches/{each.batch_id})" for each in started)
    return {
        "prompts": sum(each.items for each in started),
        "batches": dg.MetadataValue.md(links or "the gold set is empty"),
        "model": started[0].model or "of each prompt the one that it was asked" if started else "none",
    }


def describe_regression(report: "RegressionReport", least: float, services: Services) -> dict[str, Any]:
    """Return the metadata of `regression_report`: `agreement` is the mean token F1, over all prompts."""
    started, count = report.started, report.token_f1.count
    shown: dict[str, Any] = {
        "agreement": round(report.agreement, 4),
        "agreement_of_the_reviewed_answers": round(report.before.mean, 4),
        "least_agreement": least,
        "chrf": round(report.chrf.mean, 4),
        "exact_share": round(report.exact / count, 4) if count else 0.0,
        "prompts": count,
        "exact": report.exact,
        "unanswered": report.unanswered,
        "model": started.model or "of each prompt the one that it was asked",
        "gold_version": started.gold,
        "batch": dg.MetadataValue.md(f"[{started.batch_id}]({services.api_url}/v1/batches/{started.batch_id})"),
        "scores": dg.MetadataValue.path(str(report.path)),
        "scores_chart": _chart("Prompts by their agreement (token F1) with the answer that people want", report),
    }
    rows = [_worst_row(each, samples=services.settings.ui_samples) for each in report.worst]
    return shown | {"worst": dg.MetadataValue.table(rows, schema=_worst_schema(services.settings.ui_samples))}


def _chart(title: str, report: "RegressionReport") -> dg.MarkdownMetadataValue:
    now, before = draw_spread(report.token_f1.bins), draw_spread(report.before.bins)
    return dg.MetadataValue.md(f"{title}\n\n```\n{now}\n```\n\nThe answers that were reviewed\n\n```\n{before}\n```")


def _worst_row(row: "ScoreRow", *, samples: bool) -> dg.TableRecord:
    texts = {"answer": _shorten(row.answer), "expected": _shorten(row.expected)} if samples else {}
    return dg.TableRecord(
        {"custom_id": row.custom_id, "token_f1": round(row.token_f1, 3), "chrf": round(row.chrf, 3), **texts}
    )


def _worst_schema(samples: bool) -> dg.TableSchema:
    columns = {"custom_id": "string", "token_f1": "float", "chrf": "float"}
    texts = {"answer": "string", "expected": "string"} if samples else {}
    return dg.TableSchema([dg.TableColumn(name, kind) for name, kind in {**columns, **texts}.items()])


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else flat[: _SHOWN_CHARACTERS - 1] + "…"


def _table(name: str, counts: Mapping[str, int]) -> dg.MarkdownMetadataValue:
    rows = "\n".join(
        f"| {key} | {count} |" for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
    return dg.MetadataValue.md(f"| {name} | count |\n|---|---|\n{rows}" if counts else "none")
