"""A part of the fault matrix on whole stacks, each fault and each phase at least once; `make faults` runs all of it."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.disks import CannotMount, small_disk
from tests.faults.matrix import OWN, SOME_OWN, SOME_WIRE, WIRE, Outcome, run_cases
from tests.faults.world import engine_behind_proxy, own_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def test_faults_of_our_own_processes_engine_and_disk(tmp_path: Path) -> None:
    with ExitStack() as ending:
        cases, left_out = SOME_OWN, ""
        try:
            ending.enter_context(small_disk(tmp_path))
        except CannotMount as reason:
            cases, left_out = tuple(case for case in cases if case.fault != "disk full"), str(reason)
        world = ending.enter_context(own_engine(tmp_path))
        refuse(run_cases(world, cases, OWN))
        world.assert_tidy()
    if left_out:
        pytest.skip(f"all but the case of a full disk: {left_out}")


def test_faults_of_the_wire_to_the_engine(tmp_path: Path) -> None:
    with engine_behind_proxy(tmp_path) as world:
        refuse(run_cases(world, SOME_WIRE, WIRE))
        world.assert_tidy()


def refuse(outcomes: list[Outcome]) -> None:
    """Fail with every promise that was broken."""
    assert [each for each in outcomes if each.problems] == []
