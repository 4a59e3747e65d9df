"""`python -m tests.faults [FAULT ...]`: the whole fault matrix. Writes bench/results/faults.json and the table of
docs/reliability.md. Ends with 0 when only cases fail that are known to be broken.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from bench.figures import Figure, Result, Target
from bench.machine import describe_machine
from bench.report import RESULTS, write_result
from tests.faults.disks import CannotMount, small_disk
from tests.faults.matrix import OWN, PHASES, WIRE, Fault, Outcome, every_case, run_cases
from tests.faults.ratchet import judge, read_known
from tests.faults.world import engine_behind_proxy, own_engine
from vllm_batch_dagster.settings import PROJECT_ROOT, Settings

PAGE = PROJECT_ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- fault matrix: written by make faults -->", "<!-- end of the fault matrix -->"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of: {', '.join([*OWN, *WIRE])}; default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.faults) - {*OWN, *WIRE}):
        parser.error(f"no fault {', '.join(unknown)}")
    began = time.monotonic()
    outcomes = run_matrix(args.faults or [*OWN, *WIRE])
    seconds = time.monotonic() - began
    write(outcomes, seconds, args.output, whole=not args.faults)
    verdict = judge({name_of(each): each.problems for each in outcomes}, read_known())
    for sentence in [*verdict, f"{len(outcomes)} cells in {seconds:.0f} s, {broken(outcomes)} broken"]:
        say(sentence)
    return 1 if verdict else 0


def run_matrix(wanted: Sequence[str]) -> list[Outcome]:
    """Run the faults that are wanted, on a stack with an engine of its own and on one whose engine is behind a wire."""
    outcomes: list[Outcome] = []
    own = {name: fault for name, fault in OWN.items() if name in wanted}
    wire = {name: fault for name, fault in WIRE.items() if name in wanted}
    if own:
        outcomes += _run_own(own)
    if wire:
        with engine_behind_proxy(Path(tempfile.mkdtemp(prefix="vllm-batch-faults-"))) as world:
            outcomes += run_cases(world, every_case(wire), wire, say)
            world.assert_tidy()
    return outcomes


def _run_own(faults: Mapping[str, Fault]) -> list[Outcome]:
    folder = Path(tempfile.mkdtemp(prefix="vllm-batch-faults-"))
    with ExitStack() as ending:
        if "disk full" in faults:
            try:
                ending.enter_context(small_disk(folder, mib=512))
            except CannotMount as reason:
                say(f"without the row of a full disk: {reason}")
                faults = {name: fault for name, fault in faults.items() if name != "disk full"}
        world = ending.enter_context(own_engine(folder))
        outcomes = run_cases(world, every_case(faults), faults, say)
        world.assert_tidy()
    return outcomes


def name_of(outcome: Outcome) -> str:
    return f"{outcome.fault} @ {outcome.phase}"


def broken(outcomes: Sequence[Outcome]) -> int:
    return sum(bool(each.problems) for each in outcomes)


def write(outcomes: Sequence[Outcome], seconds: float, folder: Path, *, whole: bool) -> None:
    """Write the JSON file, and the page when the matrix is whole."""
    result = Result(
        name="faults",
        title="each phase of a batch meets each fault, on the simulated engine",
        figures=(
            Figure("cells with a broken promise", "", (float(broken(outcomes)),), Target(0.0)),
            Figure("cells", "", (float(len(outcomes)),)),
            Figure("the whole matrix", "s", (seconds,)),
        ),
        raw=[{"fault": each.fault, "phase": each.phase, "problems": each.problems} for each in outcomes],
        notes=("What a cell does and what is checked is in [docs/reliability.md](../../docs/reliability.md).",),
    )
    date = datetime.now(UTC).isoformat(timespec="seconds")
    write_result(result, describe_machine(Settings(_env_file=None)), date, folder)
    if whole:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        tail = rest.partition(END)[2]
        table = "\n".join(render_table(outcomes))
        PAGE.write_text(f"{head}{BEGIN}\n\nRun of {date[:10]}.\n\n{table}\n\n{END}{tail}")


def render_table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the Markdown table: faults by phases, `kept` or the number of broken promises."""
    cells = {(each.fault, each.phase): str(len(each.problems)) if each.problems else "kept" for each in outcomes}
    faults = list(dict.fromkeys(each.fault for each in outcomes))
    lines = [f"| fault | {' | '.join(PHASES)} |", "|---" * (len(PHASES) + 1) + "|"]
    return [
        *lines,
        *(f"| {fault} | {' | '.join(cells.get((fault, phase), '') for phase in PHASES)} |" for fault in faults),
    ]


def say(sentence: str) -> None:
    sys.stdout.write(f"{datetime.now(UTC):%H:%M:%S} {sentence}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
