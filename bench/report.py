"""Writes bench/results: one JSON file per scenario and one Markdown table over all of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.figures import Result, format_number

RESULTS = Path(__file__).resolve().parent / "results"
ORDER = (
    *("cold", "warm", "latency", "orchestration", "overhead", "memory", "import", "journal", "million"),
    *(
        "recovery-engine",
        "recovery-simulated",
        "recovery-run",
        "kills",
        "kills-real",
        "faults",
        "validation",
        "upload",
        "polling",
    ),
)

_HEAD = """# Measurements

Made by `make bench` (`python -m bench`); what each figure means is in [docs/benchmarks.md](../../docs/benchmarks.md).
A figure is the median of its repetitions; a target holds for the median. Every single value, the set-up and the
machine are in the JSON files beside this one.
"""


def write_result(result: Result, machine: Mapping[str, Any], date: str, folder: Path = RESULTS) -> Path:
    """Write `<name>.json` and make the table again. Returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    path.write_text(json.dumps(as_data(result, machine, date), indent=2, ensure_ascii=False) + "\n")
    (folder / "README.md").write_text(render_page(read_results(folder)))
    return path


def as_data(result: Result, machine: Mapping[str, Any], date: str) -> dict[str, Any]:
    return {
        "scenario": result.name,
        "title": result.title,
        "date": date,
        "machine": dict(machine),
        "setup": dict(result.setup),
        "figures": [figure.as_data() for figure in result.figures],
        "notes": list(result.notes),
        "runs": [dict(row) for row in result.raw],
    }


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return what is measured so far, in the order of the scenarios."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(found, key=lambda data: ORDER.index(data["scenario"]) if data["scenario"] in ORDER else len(ORDER))


def render_page(results: Sequence[Mapping[str, Any]]) -> str:
    """Return README.md: machine, table, notes."""
    parts = [_HEAD, *_machines(results), "\n".join(_table(results)), *map(_notes, results)]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _machines(results: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """One line per machine, so that a table with results of several says so."""
    lines: dict[str, list[str]] = {}
    for data in results:
        lines.setdefault(describe_machine(data["machine"]), []).append(f"{data['scenario']} ({data['date'][:10]})")
    return [f"{machine}: {', '.join(names)}." for machine, names in lines.items()]


def describe_machine(machine: Mapping[str, Any]) -> str:
    engine = f"vLLM {machine['vllm']} on {machine['device']}"
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB"
    return f"{where}, {engine}, Dagster {machine['dagster']}, Python {machine['python']}"


def _table(results: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    yield "| scenario | figure | median | min to max | runs | target | met |"
    yield "|---|---|---|---|---|---|---|"
    for data in results:
        for figure in data["figures"]:
            yield _row(data["scenario"], figure)


def _row(scenario: str, figure: Mapping[str, Any]) -> str:
    target = figure.get("target")
    is_repeated = len(figure["values"]) > 1
    spread = f"{format_number(figure['min'])} to {format_number(figure['max'])}" if is_repeated else ""
    cells = (
        scenario,
        figure["name"],
        f"{format_number(figure['median'])} {figure['unit']}".rstrip(),
        spread,
        str(len(figure["values"])),
        target["words"] if target else "",
        ("yes" if target["met"] else "**no**") if target else "",
    )
    return "| " + " | ".join(cells) + " |"


def _notes(data: Mapping[str, Any]) -> str:
    sentences = "".join(f"- {note}\n" for note in data["notes"])
    return f"## {data['scenario']}: {data['title']}\n\n{sentences}"
