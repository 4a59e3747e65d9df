"""`python -m bench [SCENARIO ...] [--runs N]`: measure, show progress, write bench/results.

Results are written after each scenario, so that an interrupted measurement keeps what it has.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.errors import BenchFailed
from bench.figures import Figure, format_number
from bench.machine import describe_machine
from bench.plan import QUICK, Plan, Sizes
from bench.report import RESULTS, write_result
from bench.scenarios import ONLY_BY_NAME, SCENARIOS, Measure
from bench.stack import forget_settings
from bench.terminal import say
from vllm_batch_dagster.core.errors import BatchError
from vllm_batch_dagster.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 when everything was measured, whether or not the targets are met."""
    args = _parser().parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # both end in order: nothing is left running
        signal.signal(number, signal.default_int_handler)
    forget_settings()
    folder = Path(tempfile.mkdtemp(prefix="vllm-batch-bench-"))
    sizes = QUICK if args.quick else Sizes()
    plan = Plan(folder, _results_folder(args), 1 if args.quick else args.runs, sizes)
    try:
        _measure_all(plan, choose(args.scenarios))
    except (BenchFailed, BatchError) as error:
        say(f"FAILED: {error}\nThe state and the logs are kept in {folder}.")
        return 1
    except KeyboardInterrupt:
        say("interrupted; everything is stopped")
        code = 130
    else:
        say(f"the table is {plan.results / 'README.md'}")
        code = 0
    shutil.rmtree(folder, ignore_errors=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "scenarios",
        nargs="*",
        metavar="SCENARIO",
        help=f"of {', '.join(SCENARIOS)}; default: all but {' and '.join(sorted(ONLY_BY_NAME))}",
    )
    parser.add_argument("--runs", type=_positive, default=3, metavar="N", help="repetitions (default: 3)")
    parser.add_argument("--quick", action="store_true", help="few lines, once: proves only that it works")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"default: {RESULTS.parent.name}/{RESULTS.name}")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _results_folder(args: argparse.Namespace) -> Path:
    """Figures of a quick run must never be taken for measurements."""
    if args.output:
        return Path(args.output).absolute()
    return Path(tempfile.gettempdir()) / "vllm-batch-bench-quick" if args.quick else RESULTS


def choose(names: Sequence[str]) -> list[Measure]:
    """Return the measurements behind the names, each once. Raises SystemExit for a name that is none."""
    if unknown := sorted(set(names) - set(SCENARIOS)):
        raise SystemExit(f"no scenario {', '.join(unknown)}; there are: {', '.join(SCENARIOS)}")
    chosen = names or [name for name in SCENARIOS if name not in ONLY_BY_NAME]
    return list(dict.fromkeys(SCENARIOS[name] for name in chosen))


def _measure_all(plan: Plan, measures: Sequence[Measure]) -> None:
    machine = describe_machine(Settings(_env_file=None))
    for measure in measures:
        for result in measure(plan):
            path = write_result(result, machine, datetime.now(UTC).isoformat(timespec="seconds"), plan.results)
            say(f"== {result.name}: {result.title}")
            for figure in result.figures:
                say(f"   {_describe(figure)}")
            say(f"   written to {path}")


def _describe(figure: Figure) -> str:
    spread = f" ({format_number(figure.low)} to {format_number(figure.high)})" if len(figure.values) > 1 else ""
    target = f"; target {figure.target.words}: {'met' if figure.is_met else 'MISSED'}" if figure.target else ""
    return f"{figure.name}: {format_number(figure.median)} {figure.unit}{spread}{target}"


if __name__ == "__main__":
    sys.exit(main())
