"""`python -m tests.faults.chaos --seed N --minutes M`: random faults at random times at one large batch after another.

The seed alone decides which fault comes when, so it replays the same sequence. What stands where at that moment is up
to the machine: a fault that meets nothing (no engine, no run) is counted as idle. In the end every batch must keep the
promises of docs/reliability.md.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.e2e.batches import TERMINAL
from tests.faults.disks import CannotMount, small_disk
from tests.faults.engine_group import CORE, WORKER
from tests.faults.ratchet import judge, read_known
from tests.faults.world import Submitted, World, kill, own_engine
from vllm_batch_dagster.failpoints import POINTS

LINES = 20_000
FIRST_SECONDS, LEAST_GAP, MOST_GAP = 8.0, 3.0, 14.0
FULL_SECONDS, STOPPED_SECONDS = 4.0, 3.0
END_SECONDS = 1800
SETTINGS = {"CHUNK_SIZE": "2000", "CHUNK_SLOTS": "12", "MAX_NUM_SEQS": "16", "JOURNAL_COMMIT_SECONDS": "0.2"}
WINDOW = 32  # twice MAX_NUM_SEQS: what a death makes be sent again at most (stages/flight.py)
MOST_MARKS = 10

# Fault -> weight. Those that end a batch (cancel, expiry) are in the matrix.
WEIGHTS = {
    "run": 6,
    "point": 4,
    "engine API": 4,
    "engine core": 4,
    "engine worker": 2,
    "engine stopped": 1,
    "api": 2,
    "daemon": 2,
    "web": 1,
    "code": 2,
    "disk full": 1,
    "frozen run": 1,
    "stack": 1,
}


@dataclass(frozen=True)
class Strike:
    """A fault `at` seconds after the start; `choice` in 0..1 picks what it hits."""

    at: float
    fault: str
    choice: float


def plan_strikes(seed: int, minutes: float) -> list[Strike]:
    """Return the faults of a seed in their order. A longer run begins with the same ones."""
    dice = random.Random(seed)
    strikes: list[Strike] = []
    at = FIRST_SECONDS
    while at < minutes * 60:
        (fault,) = dice.choices(list(WEIGHTS), list(WEIGHTS.values()))
        strikes.append(Strike(round(at, 3), fault, dice.random()))
        at += dice.uniform(LEAST_GAP, MOST_GAP)
    return strikes


@dataclass
class Tally:
    """What came of the faults: by name, those that met something and those that did not."""

    met: Counter[str] = field(default_factory=Counter)
    idle: Counter[str] = field(default_factory=Counter)


class Chaos:
    """One run. `say` prints a line of progress."""

    def __init__(self, world: World, say: Callable[[str], None], lines: int = LINES) -> None:
        self._world, self._say, self._lines = world, say, lines
        self._began = time.monotonic()
        self.tally = Tally()
        self.batches: list[Submitted] = []

    def run(self, strikes: Sequence[Strike]) -> list[str]:
        """Throw the faults, wait for the end, and return every broken promise."""
        for strike in strikes:
            time.sleep(max(0.0, self._began + strike.at - time.monotonic()))
            self._restart_if_down()
            self._keep_busy()
            met = self._throw(strike)
            (self.tally.met if met else self.tally.idle)[strike.fault] += 1
            self._say(f"{strike.at:7.1f} s  {strike.fault}{'' if met else ' (nothing there)'}; {self._progress()}")
        self._restart_if_down()
        self._disarm()
        self._world.wait_ended(self.batches, END_SECONDS)
        return [f"{batch.id}: {problem}" for batch in self.batches for problem in self._check(batch)]

    def _check(self, batch: Submitted) -> list[str]:
        bound = (sum(self.tally.met.values()) + 1) * WINDOW
        redone = self._world.redone(batch)
        too_many = [f"{redone} lines sent again, more than {bound}"] if redone > bound else []
        return [*self._world.check(batch), *too_many]

    def _keep_busy(self) -> None:
        if not self.batches or self._world.status(self.batches[-1]) in TERMINAL:
            self.batches.append(self._world.submit(self._lines))

    def _progress(self) -> str:
        counts = self._world.client.batches.retrieve(self.batches[-1].id).request_counts
        return f"batch {len(self.batches)}: {counts.completed if counts else 0} of {self._lines}"

    def _restart_if_down(self) -> None:
        """As systemd does for an `up` that gave up."""
        if not self._world.is_up:
            self._say("`up` has given up; it is started again")
            self._world.start()

    def _throw(self, strike: Strike) -> bool:
        """Let a fault come. Returns False when there was nothing that it could meet."""
        world = self._world
        self._mark()
        if strike.fault == "run":
            return self._kill_runs()
        if strike.fault == "point":
            return self._arm(strike.choice)
        if strike.fault.startswith("engine"):
            return self._hurt_engine(strike.fault)
        if strike.fault == "frozen run":
            return self._freeze_run()
        if strike.fault == "disk full":
            return self._fill_disk()
        if strike.fault == "stack":
            world.crash()
            world.start()
            return True
        kill(world.pid_of(strike.fault))
        return True

    def _mark(self) -> None:
        """The witness of all lines is read only now and then: it grows large."""
        if len(self.batches[-1].marks) < MOST_MARKS:
            self._world.mark_all()

    def _kill_runs(self) -> bool:
        workers = self._world.run_workers()
        for worker in workers:
            kill(worker.pid)
        return bool(workers)

    def _freeze_run(self) -> bool:
        workers = self._world.run_workers()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.suspend()
        time.sleep(STOPPED_SECONDS)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.resume()
        return bool(workers)

    def _arm(self, choice: float) -> bool:
        points = [point for point in POINTS if point not in ("joining", "joined")]
        point = points[int(choice * len(points))]
        self._world.arm(point, self.batches[-1], "kill 2" if point in ("mid_chunk", "merging") else "kill")
        return True

    def _disarm(self) -> None:
        for order in self._world.points.iterdir():
            order.unlink(missing_ok=True)

    def _hurt_engine(self, fault: str) -> bool:
        name = {"engine core": CORE, "engine worker": WORKER}.get(fault, "")
        pid = self._world.find_engine(name)
        if pid is not None:
            kill(pid, signal.SIGSTOP if fault == "engine stopped" else signal.SIGKILL)
        return pid is not None

    def _fill_disk(self) -> bool:
        if not self._world.home.is_mount():
            return False
        self._world.fill_disk()
        time.sleep(FULL_SECONDS)
        self._world.mend()
        return True


def run_chaos(seed: int, minutes: float, lines: int, say: Callable[[str], None]) -> list[str]:
    """Run one seed on a stack of its own and return every broken promise."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-batch-chaos-"))
    with ExitStack() as ending:
        try:
            ending.enter_context(small_disk(folder, mib=1024))
        except CannotMount as reason:
            say(f"without full disks: {reason}")
        world = ending.enter_context(own_engine(folder, **SETTINGS))
        chaos = Chaos(world, say, lines)
        problems = chaos.run(plan_strikes(seed, minutes))
        redone = sum(world.redone(batch) for batch in chaos.batches)
        thrown = sum(chaos.tally.met.values())
        say(f"seed {seed}: {thrown} faults met something {dict(chaos.tally.met)}, idle {dict(chaos.tally.idle)}")
        mean = redone / max(1, thrown)
        say(f"{len(chaos.batches)} batches of {lines} lines; {redone} lines sent again, {mean:.1f} a fault")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--lines", type=int, default=LINES)
    args = parser.parse_args(argv)
    problems = run_chaos(args.seed, args.minutes, args.lines, _say)
    for problem in problems:
        _say(f"BROKEN: {problem}")
    verdict = judge({f"chaos {args.seed}": problems}, read_known())
    for sentence in verdict:
        _say(sentence)
    _say("chaos: every promise was kept" if not problems else f"chaos: {len(problems)} broken promises")
    return 1 if verdict else 0


def _say(sentence: str) -> None:
    sys.stdout.write(f"{sentence}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
