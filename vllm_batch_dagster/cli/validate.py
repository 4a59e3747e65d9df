"""`vllm-batch validate FILE`: the pre-flight report as tables. The file is uploaded for it and deleted again."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, cast

import openai
import typer
from rich.table import Table

from vllm_batch_dagster.cli.api_client import open_client
from vllm_batch_dagster.cli.batches import SHOWN_ERRORS, parse_metadata
from vllm_batch_dagster.cli.console import out, print_json
from vllm_batch_dagster.core.histogram import draw_histogram
from vllm_batch_dagster.settings import load_settings

LIFETIME_SECONDS = 3600  # of the upload, in case that nobody is left to delete it

Report = Mapping[str, Any]


def validate(
    file: Annotated[Path, typer.Argument(help="JSONL file, one request per line.", exists=True, dir_okay=False)],
    endpoint: Annotated[str, typer.Option(help="Endpoint of every line.")] = "/v1/chat/completions",
    window: Annotated[str, typer.Option(help="Completion window.")] = "24h",
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be given many times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check FILE before any engine time is spent: bad lines, tokens, context, run time. Exit code 1 for bad lines."""
    params = {"endpoint": endpoint, "completion_window": window, "metadata": parse_metadata(metadata or []) or None}
    with open_client(load_settings()) as client:
        report = fetch_report(client, file, params)
    if as_json:
        print_json(report)
    else:
        show_report(file, report)
    raise typer.Exit(0 if report["valid"] else 1)


def fetch_report(client: openai.OpenAI, file: Path, params: Mapping[str, object]) -> Report:
    """Upload, ask, delete."""
    expiry = {"anchor": "created_at", "seconds": LIFETIME_SECONDS}
    uploaded = client.files.create(file=file, purpose="batch", expires_after=cast(Any, expiry))
    try:
        body = {**params, "input_file_id": uploaded.id}
        return cast(Report, client.post("/batches/validate", body=body, cast_to=object))
    finally:
        with suppress(openai.OpenAIError):
            client.files.delete(uploaded.id)


def show_report(file: Path, report: Report) -> None:
    out.print(_summary(file, report))
    if report["errors"]:
        found = report["errors"]["data"]
        rows = [(error["line"] or "-", error["code"], error["message"]) for error in found]
        out.print(_table("Bad lines", ("line", "code", "message"), rows))
    if (too_long := report["too_long"]) and too_long["data"]:
        unfit = [(item["line"], item["custom_id"], item["tokens"], item["code"]) for item in too_long["data"]]
        out.print(_table("Lines that will not fit", ("line", "custom_id", "tokens", "code"), unfit))
    if report["tokens"]:
        buckets = tuple((bucket["up_to"], bucket["lines"]) for bucket in report["tokens"]["histogram"])
        out.print("Tokens per request")
        out.print(draw_histogram(buckets))
    for note in _notes(report):
        out.print(note)


def _summary(file: Path, report: Report) -> Table:
    tokens, repeats, time = report["tokens"], report["duplicates"], report["run_time"]
    table = Table(title=str(file), show_header=False)
    table.add_row("result", "[green]valid[/]" if report["valid"] else "[red]not valid[/]")
    table.add_row("lines", f"{report['lines']:,}")
    if report["rejected_lines"]:
        table.add_row("lines that would be rejected", f"{report['rejected_lines']:,}")
    table.add_row("models", ", ".join(load["model"] for load in report["models"]) or "-")
    if repeats:
        about = "" if repeats["exact"] else "about "
        table.add_row("repeated custom_ids", f"{repeats['custom_ids']:,}")
        table.add_row("repeated requests", f"{about}{repeats['requests']:,}")
    if tokens:
        about = "about " if tokens["sampled"] else ""
        table.add_row("input tokens", f"{about}{tokens['input_tokens']:,} (longest request {tokens['longest']:,})")
    for load in report["models"]:
        if load["max_model_len"]:
            table.add_row(f"context of {load['model']}", f"{load['max_model_len']:,} tokens")
    if time:
        table.add_row("run time", describe_seconds(time["seconds"], time["low"], time["high"]))
    return table


def describe_seconds(middle: float | None, low: float | None, high: float | None) -> str:
    """Return `5 min (4 min to 7 min)`; `not known` without an estimate."""
    if middle is None or low is None or high is None:
        return "not known"
    return f"{_spell(middle)} ({_spell(low)} to {_spell(high)})"


def _spell(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _table(title: str, columns: Iterable[str], rows: Sequence[tuple[Any, ...]]) -> Table:
    more = len(rows) - SHOWN_ERRORS
    table = Table(*columns, title=title, caption=f"and {more} more: see them with --json" if more > 0 else None)
    for row in rows[:SHOWN_ERRORS]:
        table.add_row(*(str(cell) for cell in row))
    return table


def _notes(report: Report) -> Iterable[str]:
    if report["tokens"]:
        yield report["tokens"]["note"]
    yield from (f"{load['model']}: {load['note']}" for load in report["models"])
    if (too_long := report["too_long"]) and too_long["shortened"]:
        yield f"{too_long['shortened']} lines leave less room for the answer than their max_tokens."
    if report["run_time"]:
        yield report["run_time"]["note"]
