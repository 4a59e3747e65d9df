"""`vllm-batch verify BATCH`: is everything on disk as it was written? Reads the state folder, without the API."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_batch_dagster.cli.batches import BatchArgument
from vllm_batch_dagster.cli.console import out, print_json
from vllm_batch_dagster.cli.state_folder import has_store
from vllm_batch_dagster.composition import build_files, build_store, build_workspace
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.verification import Problem, VerifyReport
from vllm_batch_dagster.settings import Settings, load_settings
from vllm_batch_dagster.stages.verification import VerifyPorts, verify_batch


def verify(
    batch: BatchArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check all of a batch on disk: digests, counts, every line exactly once. Exit code 1 for a problem."""
    report = check(batch, load_settings(), quiet=as_json)
    if as_json:
        print_json(as_data(report))
    else:
        show(report)
    raise typer.Exit(0 if report.is_good else 1)


def check(batch_id: str, settings: Settings, *, quiet: bool = False) -> VerifyReport:
    """Verify a batch, with a progress bar on the terminal. Raises NotFound, StorageFailure."""
    if not has_store(settings):
        raise NotFound("batch", batch_id)
    with _bar(batch_id, quiet=quiet) as bar:
        task = bar.add_task(batch_id, total=None)
        ports = VerifyPorts(
            build_store(settings),
            build_files(settings),
            build_workspace(settings),
            start=lambda total: bar.update(task, total=total, completed=0),
            progress=lambda read: bar.advance(task, read),
        )
        return verify_batch(batch_id, ports)


@contextmanager
def _bar(batch_id: str, *, quiet: bool) -> Iterator[Progress]:
    columns = (TextColumn("verifying {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        yield bar


def as_data(report: VerifyReport) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "batch_id": report.batch_id,
        "status": report.status,
        "published": report.is_published,
        "ok": report.is_good,
        "checked": dict(report.checked),
        "problem_count": report.problem_count,
        "problems": [_describe(problem) for problem in report.problems],
        "notes": report.notes,
    }


def _describe(problem: Problem) -> dict[str, Any]:
    return {
        "kind": problem.kind.value,
        "file": problem.file,
        "line": problem.line,
        "offset": problem.offset,
        "message": problem.message,
        "mend": problem.mend,
    }


def show(report: VerifyReport) -> None:
    """Print the report."""
    seen = ", ".join(f"{count:,} {what}" for what, count in sorted(report.checked.items()))
    what = "" if report.is_published else " (nothing is merged yet)"
    verdict = "[green]good[/]" if report.is_good else f"[red]{report.problem_count} problem(s)[/]"
    out.print(f"{report.batch_id}, {report.status}{what}: {verdict}. Checked {seen or 'nothing'}.")
    if report.problems:
        table = Table("file", "line", "byte", "problem", "mend", box=None)
        for problem in report.problems:
            place = (_text(problem.line), _text(problem.offset))
            table.add_row(problem.file, *place, problem.message, problem.mend)
        out.print(table)
    if (more := report.problem_count - len(report.problems)) > 0:
        out.print(f"and {more} more")
    for note in report.notes:
        out.print(f"note: {note}")


def _text(number: int | None) -> str:
    return "" if number is None else str(number)
