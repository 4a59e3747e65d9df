"""Which phase meets which fault. The tests run a part of the matrix, `make faults` all of it.

A case is a fault and some phases: one batch for each phase stands still at the failpoint of the phase, the fault comes,
they are let go, and later must have ended as if nothing had been. All cases of a stack share it: the batches of a case
meet the faults of its neighbours too.
"""

import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import openai

from tests.faults.engine_group import CORE, WORKER
from tests.faults.world import HELD_SECONDS, HOLD_SECONDS, Submitted, World, kill, until
from vllm_batch_dagster.failpoints import POINTS

# Phase of the matrix -> failpoint, and the pass that is held.
PHASES: Mapping[str, tuple[str, int]] = {
    "validating": ("validating", 1),
    "planning": ("planning", 1),
    "chunk start": ("chunk_start", 2),
    "mid-chunk": ("mid_chunk", 2),
    "last line": ("last_line", 1),
    "publish": ("sealed", 1),
    "merge": ("merging", 20),
    "finalising": ("merged", 1),
    "handlers": ("handlers", 1),
}
# A run that stands still takes one of the eight places for runs; two cases are under way at once.
WAVES = (
    ("validating", "chunk start", "last line"),
    ("planning", "mid-chunk", "publish"),
    ("merge", "finalising", "handlers"),
)
# Points of uploads belong to the API and have tests of their own.
RUN_POINTS = tuple(point for point in POINTS if point not in ("joining", "joined"))


@dataclass
class Held:
    """A batch that stands in a phase; `pid` is the run's process, 0 when it never came there."""

    phase: str
    point: str
    batch: Submitted
    pid: int = 0

    def problems(self, world: World) -> list[str]:
        missed = [] if self.pid else [f"it never came to the failpoint {self.point}"]
        return [*missed, *world.check(self.batch)]


Fault = Callable[[World, Sequence[Held]], None]


@dataclass(frozen=True)
class Case:
    """A fault and the phases that it meets."""

    fault: str
    phases: tuple[str, ...]


@dataclass
class Outcome:
    """What came of one cell of the matrix: nothing wrong, or what."""

    fault: str
    phase: str
    batch_id: str
    problems: list[str] = field(default_factory=list)


def kill_runs(_world: World, held: Sequence[Held]) -> None:
    for each in held:
        if each.pid:
            kill(each.pid)


def kill_engine(name: str) -> Fault:
    return lambda world, _held: kill(world.engine_pid(name))


def stop_engine(world: World, _held: Sequence[Held]) -> None:
    kill(world.engine_pid(), signal.SIGSTOP)


def kill_service(name: str) -> Fault:
    """Kill it and wait until another one is there."""

    def apply(world: World, _held: Sequence[Held]) -> None:
        before = world.pid_of(name)
        kill(before)
        assert until(lambda: world.pid_of(name) != before, HELD_SECONDS), f"{name} was not started again"

    return apply


def cancel(world: World, held: Sequence[Held]) -> None:
    for each in held:
        each.batch.may_end |= {"cancelled"}
        try:
            world.client.batches.cancel(each.batch.id)
        except openai.APIStatusError:
            assert world.status(each.batch) == "completed"


def expire(world: World, held: Sequence[Held]) -> None:
    for each in held:
        each.batch.may_end |= {"expired"}
        world.expire(each.batch)


def restart_stack(world: World, _held: Sequence[Held]) -> None:
    world.crash()
    world.start()


def second_daemon(world: World, _held: Sequence[Held]) -> None:
    world.start_second_daemon()


def fill_disk(world: World, _held: Sequence[Held]) -> None:
    world.fill_disk()


def cut(world: World, _held: Sequence[Held]) -> None:
    assert world.proxy is not None
    world.proxy.cut()


def blackhole(world: World, _held: Sequence[Held]) -> None:
    assert world.proxy is not None
    world.proxy.blackhole()


def reset(world: World, _held: Sequence[Held]) -> None:
    assert world.proxy is not None
    world.proxy.reset()


def slow(world: World, _held: Sequence[Held]) -> None:
    assert world.proxy is not None
    world.proxy.delay(0.5)


# Faults of a stack with an engine of its own, and of one whose engine is behind a wire.
OWN: Mapping[str, Fault] = {
    "SIGKILL of the run": kill_runs,
    "SIGKILL of the engine core": kill_engine(CORE),
    "SIGKILL of the engine API": kill_engine(""),
    "SIGKILL of the engine worker": kill_engine(WORKER),
    "SIGSTOP of the engine": stop_engine,
    "SIGKILL of the API shim": kill_service("api"),
    "SIGKILL of the daemon": kill_service("daemon"),
    "SIGKILL of the webserver": kill_service("web"),
    "SIGKILL of the code server": kill_service("code"),
    "a second daemon": second_daemon,
    "disk full": fill_disk,
    "cancel": cancel,
    "expiry": expire,
    "restart of the whole stack": restart_stack,
}
WIRE: Mapping[str, Fault] = {"network cut": cut, "network blackhole": blackhole, "network reset": reset, "delay": slow}
# Seconds for which an outage goes on after the held runs were let go; then it is mended. The silence is longer than
# ENGINE_STALL_SECONDS and a look at /health.
OUTAGES = {"network cut": 3.0, "network blackhole": 12.0, "delay": 3.0, "disk full": 6.0, "a second daemon": 20.0}

# What `make test` runs: every fault and every phase at least once, those that belong together most often.
SOME_OWN = (
    Case("SIGKILL of the engine core", ("mid-chunk",)),
    Case("SIGKILL of the run", ("merge",)),
    Case("SIGKILL of the code server", ("mid-chunk", "handlers")),
    Case("SIGSTOP of the engine", ("chunk start",)),
    Case("SIGKILL of the daemon", ("publish",)),
    Case("SIGKILL of the API shim", ("validating",)),
    Case("SIGKILL of the engine API", ("last line",)),
    Case("cancel", ("mid-chunk",)),
    Case("SIGKILL of the webserver", ("merge",)),
    Case("SIGKILL of the engine worker", ("mid-chunk",)),
    Case("a second daemon", ("validating",)),
    Case("expiry", ("chunk start",)),
    Case("disk full", ("mid-chunk", "merge")),
    Case("restart of the whole stack", ("planning", "finalising")),
)
SOME_WIRE = (
    Case("network reset", ("mid-chunk",)),
    Case("network cut", ("chunk start",)),
    Case("network blackhole", ("mid-chunk",)),
    Case("delay", ("last line",)),
)


def every_case(faults: Iterable[str]) -> tuple[Case, ...]:
    """Return the whole matrix of these faults."""
    return tuple(Case(fault, phases) for fault in faults for phases in WAVES)


def run_cases(
    world: World, cases: Sequence[Case], faults: Mapping[str, Fault], say: Callable[[str], None] = lambda _: None
) -> list[Outcome]:
    """Run the cases one after the other, the batches of the next one already on their way."""
    held = {case: [hold(world, phase) for phase in case.phases] for case in cases[:1]}
    for case, following in pairwise((*cases, None)):
        assert case is not None
        if following is not None:
            held[following] = [hold(world, phase) for phase in following.phases]
        wait_held(world, held[case])
        say(f"{case.fault} at {', '.join(case.phases)}")
        strike(world, held[case], faults[case.fault], OUTAGES.get(case.fault, 0.0))
    world.wait_ended(world.submitted)
    return [
        Outcome(case.fault, each.phase, each.batch.id, each.problems(world)) for case in cases for each in held[case]
    ]


def hold(world: World, phase: str) -> Held:
    """Submit a batch that will stand still in `phase`."""
    point, passing = PHASES[phase]
    batch = world.submit()
    world.arm(point, batch, f"hold {passing} {HOLD_SECONDS}")
    return Held(phase, point, batch)


def wait_held(world: World, standing: Sequence[Held]) -> None:
    for each in standing:
        until(lambda each=each: world.hit(each.point, each.batch) is not None, HELD_SECONDS)  # type: ignore[misc]
        each.pid = world.hit(each.point, each.batch) or 0


def strike(world: World, standing: Sequence[Held], fault: Fault, outage: float) -> None:
    """Let the fault come and the batches go on."""
    fault(world, standing)
    world.mark_all()
    for each in standing:
        world.release(each.point, each.batch)
    if outage:
        time.sleep(outage)
        world.mend()
