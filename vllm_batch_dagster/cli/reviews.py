"""`vllm-batch reviews export`: what reviewers said, as examples for a prompt or as the input of a next batch.

Reads the reviews that the asset `reviewed_items` has pulled; only `--submit` needs a running stack.
"""

import secrets
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from vllm_batch_dagster.cli.api_client import open_client
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.review import VERDICTS
from vllm_batch_dagster.settings import Settings, load_settings
from vllm_batch_dagster.stages.publication import publish

if TYPE_CHECKING:
    from vllm_batch_dagster.stages.review_export import ExportCounts

app = typer.Typer(help="Use what reviewers said about answers.", no_args_is_help=True)

DEFAULT_EXAMPLES = 8


class Form(StrEnum):
    """What to write."""

    FEW_SHOT = "few-shot"
    NEXT_BATCH = "next-batch"


@app.callback()
def reviews() -> None:
    """Keeps `export` a command of its own: a group of one would be run without its name."""


@app.command()
def export(
    form: Annotated[Form, typer.Option("--as", help="few-shot: examples; next-batch: prompts to ask again.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: --as with .jsonl.")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(min=0, help="Examples at most (few-shot: 8), or those to put in front of each prompt (none)."),
    ] = None,
    verdict: Annotated[list[str] | None, typer.Option(help="Prompts with these verdicts: reject and edit.")] = None,
    model: Annotated[str, typer.Option(help="Ask this model; default: of each prompt its own.")] = "",
    submit: Annotated[bool, typer.Option("--submit", help="next-batch: create the batch, and print its id.")] = False,
) -> None:
    """Write reviewer corrections as few-shot examples, or rejected and edited prompts as the next batch."""
    settings = load_settings()
    if submit and form is Form.FEW_SHOT:
        raise InvalidInput("--submit is for --as next-batch: examples are no batch")
    if unknown := set(verdict or ()).difference(VERDICTS):
        raise InvalidInput(f"--verdict {sorted(unknown)[0]!r} is none of {', '.join(VERDICTS)}")
    # It brings polars along, which no other command needs.
    from vllm_batch_dagster.stages.review_export import ExportCounts

    counts = ExportCounts()
    lines = _lines(settings, form, examples, verdict or ["reject", "edit"], model, counts)
    if submit and output is None:
        with TemporaryDirectory(prefix="reviews-") as folder:
            _finish(settings, lines, Path(folder) / f"{form}.jsonl", counts, submit=True)
    else:
        _finish(settings, lines, output or Path(f"{form}.jsonl"), counts, submit=submit)


def _lines(
    settings: Settings, form: Form, most: int | None, verdicts: list[str], model: str, counts: "ExportCounts"
) -> Iterable[bytes]:
    from vllm_batch_dagster.stages.review_export import ExportCounts as Ignored
    from vllm_batch_dagster.stages.review_export import choose_examples, example_lines, next_batch_lines

    datasets, rule = settings.datasets_folder, settings.review_rule
    if form is Form.FEW_SHOT:
        shown = choose_examples(datasets, rule, DEFAULT_EXAMPLES if most is None else most, counts)
        return example_lines(shown, counts)
    shown = choose_examples(datasets, rule, most, Ignored()) if most else []
    return next_batch_lines(datasets, rule, verdicts, shown, model, counts)


def _finish(settings: Settings, lines: Iterable[bytes], target: Path, counts: "ExportCounts", *, submit: bool) -> None:
    with publish(target.absolute()) as file:
        for line in lines:
            file.write(line)
    _tell(target, counts, is_kept=not submit)
    if submit and counts.written:
        typer.echo(_submit(settings, target, counts.endpoint))


def _tell(target: Path, counts: "ExportCounts", *, is_kept: bool) -> None:
    """Say on stderr what was left out; on stdout only where the file is, so that a script can read it."""
    left_out = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in counts.left_out.most_common())
    typer.echo(f"{counts.written} lines written; left out: {left_out or 'nothing'}", err=True)
    if is_kept:
        typer.echo(target)


def _submit(settings: Settings, file: Path, endpoint: str) -> str:
    with open_client(settings) as client:
        once = {"Idempotency-Key": secrets.token_hex(16)}
        uploaded = client.files.create(file=file, purpose="batch", extra_headers=once)
        batch = client.batches.create(
            input_file_id=uploaded.id,
            endpoint=cast(Any, endpoint),
            completion_window="24h",
            metadata={"name": "next-batch", "made_of": "reviews"},
            extra_headers=once,
        )
        return batch.id
