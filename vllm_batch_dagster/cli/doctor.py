"""`vllm-batch doctor`: looks at everything that the stack needs and says how to mend what is wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from vllm_batch_dagster.cli.checkup import (
    Finding,
    check_device,
    check_disk,
    check_engine_environment,
    check_models,
    check_ports,
    check_python,
    check_running_engine,
    check_state_folder,
    check_store,
)
from vllm_batch_dagster.cli.console import print_json
from vllm_batch_dagster.cli.curation_checkup import check_curation
from vllm_batch_dagster.cli.handler_checkup import check_handlers
from vllm_batch_dagster.settings import Settings, load_settings

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check Python, disk, ports, device, engine, models, state folder, store, handlers and curation.

    Exit code 1 on a failure."""
    findings = list(examine(load_settings()))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _show(findings)
    raise typer.Exit(1 if any(finding.level == "fail" for finding in findings) else 0)


def examine(settings: Settings) -> Iterator[Finding]:
    """Run every check."""
    yield check_python()
    yield check_disk(settings)
    yield from check_ports(settings)
    yield check_device()
    yield check_engine_environment(settings)
    yield check_running_engine(settings)
    yield from check_models(settings)
    yield check_state_folder(settings)
    yield check_store(settings)
    yield from check_handlers(settings)
    yield from check_curation(settings)


def _show(findings: Sequence[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        level = typer.style(f"{finding.level:<4}", fg=COLOURS[finding.level])
        typer.echo(f"{level}  {finding.check:<{width}}  {finding.text}")
        if finding.mend:
            typer.echo(f"{'':<6}{'':<{width}}  mend: {finding.mend}")
