"""`vllm-batch config`: every setting with its value, where that comes from, and what it means."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from dotenv import dotenv_values
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from rich.table import Table

from vllm_batch_dagster.cli.console import out, print_json
from vllm_batch_dagster.settings import Settings, load_settings

MASK = "********"
HEADER = """# Configuration

Every setting is an environment variable; a `.env` file in the working directory gives what the environment does
not. `vllm-batch config` shows the values in force and where each comes from. This page is made by
`vllm-batch config --markdown`; a test compares the two.

| variable | default | meaning |
|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as it is in force. `source`: default, environment or .env."""

    name: str
    value: str
    source: str
    description: str


def config(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/configuration.md: defaults, no values.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting, its value and where the value comes from. Secrets are masked."""
    if markdown:
        typer.echo(render_markdown(), nl=False)
        return
    settings = describe_settings(load_settings())
    if as_json:
        print_json([asdict(setting) for setting in settings])
        return
    table = Table("setting", "value", "from", "meaning", box=None, pad_edge=False)
    for setting in settings:
        table.add_row(setting.name, setting.value, setting.source, setting.description)
    out.print(table)


def describe_settings(settings: Settings) -> list[Setting]:
    """Return the settings in the order of their definition."""
    environment = {name.lower() for name in os.environ}
    file = {name.lower() for name in dotenv_values(Path(".env"))}
    return [
        Setting(
            name=name.upper(),
            value=_show(getattr(settings, name)),
            source="environment" if name in environment else ".env" if name in file else "default",
            description=field.description or "",
        )
        for name, field in ordered_fields()
    ]


def ordered_fields() -> list[tuple[str, FieldInfo]]:
    """Return the fields of the settings: those of the class itself, then those of its parts."""
    own = Settings.__annotations__
    return sorted(Settings.model_fields.items(), key=lambda item: item[0] not in own)


def _show(value: Any) -> str:
    if isinstance(value, SecretStr):
        return MASK if value.get_secret_value() else ""
    return "" if value is None else str(value)


def render_markdown() -> str:
    """Return docs/configuration.md."""
    return HEADER + "".join(_row(name, field) for name, field in ordered_fields())


def _row(name: str, field: FieldInfo) -> str:
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{name.upper()}` | {_default(field)} | {meaning} |\n"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "found at start"
    text = _show(field.default)
    return f"`{text}`" if text else "empty"
