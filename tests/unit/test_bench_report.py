"""The table of the measuring program."""

import json
from pathlib import Path

from bench.figures import Figure, Result, Target
from bench.report import render_page, write_result

MACHINE = {
    "cpu": "Some CPU",
    "cores": 2,
    "memory_gb": 24,
    "device": "cpu",
    "vllm": "0.32.0",
    "dagster": "1.13.27",
    "python": "3.11.7",
}
COLD = Result("cold", "cold title", (Figure("ratio", "x", (1.2, 1.0, 1.5), Target(1.1)),), notes=("a note",))
WARM = Result("warm", "warm title", (Figure("wall", "s", (30.0,)),))


def rows(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("| ") and "median" not in line]


def test_the_table_has_a_row_per_figure_in_the_order_of_the_scenarios(tmp_path: Path) -> None:
    for result in (WARM, COLD):
        write_result(result, MACHINE, "2026-11-25T10:00:00+00:00", tmp_path)
    assert rows((tmp_path / "README.md").read_text()) == [
        "| cold | ratio | 1.20 x | 1 to 1.50 | 3 | at most 1.10 | **no** |",
        "| warm | wall | 30 s |  | 1 |  |  |",
    ]


def test_a_result_that_is_measured_again_replaces_the_old_one_and_keeps_the_others(tmp_path: Path) -> None:
    write_result(COLD, MACHINE, "2026-11-25T10:00:00+00:00", tmp_path)
    write_result(WARM, MACHINE, "2026-11-25T10:00:00+00:00", tmp_path)
    better = Result("cold", "cold title", (Figure("ratio", "x", (1.0,), Target(1.1)),))
    write_result(better, MACHINE, "2026-11-26T10:00:00+00:00", tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert rows(page)[0] == "| cold | ratio | 1 x |  | 1 | at most 1.10 | yes |"
    assert len(rows(page)) == 2
    assert "cold (2026-11-26), warm (2026-11-25)" in page


def test_results_of_two_machines_are_told_apart(tmp_path: Path) -> None:
    write_result(COLD, MACHINE, "2026-11-25T10:00:00+00:00", tmp_path)
    write_result(WARM, {**MACHINE, "cpu": "Another CPU"}, "2026-11-25T10:00:00+00:00", tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "Some CPU, 2 cores, 24 GB, vLLM 0.32.0 on cpu, Dagster 1.13.27, Python 3.11.7: cold (2026-11-25)." in page
    assert "Another CPU" in page


def test_the_json_file_holds_the_raw_runs_the_machine_and_the_date(tmp_path: Path) -> None:
    result = Result("cold", "t", (Figure("ratio", "x", (1.0,)),), setup={"lines": 256}, raw=({"cold_s": 70.5},))
    data = json.loads(write_result(result, MACHINE, "2026-11-25T10:00:00+00:00", tmp_path).read_text())
    assert (data["runs"], data["setup"], data["machine"]) == ([{"cold_s": 70.5}], {"lines": 256}, MACHINE)
    assert data["date"] == "2026-11-25T10:00:00+00:00"


def test_notes_and_titles_are_on_the_page(tmp_path: Path) -> None:
    write_result(COLD, MACHINE, "2026-11-25T10:00:00+00:00", tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "## cold: cold title" in page
    assert "- a note" in page


def test_a_page_without_results_has_an_empty_table() -> None:
    assert rows(render_page([])) == []
