"""What the health gate says of readings: two thresholds, looks in a row, and fail-closed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.gpu_health import GpuLimits, GpuMemory, GpuReading, judge, remember
from vllm_batch_dagster.core.pauses import LATCHED, Pause, PauseCause
from vllm_batch_dagster.stages.watching import GpuWatch

LIMITS = GpuLimits()
WELL = GpuReading("GPU 0", celsius=40, other_memory=0.0, throttled=False, ecc_errors=0)
DEAD_BAND = [replace(WELL, celsius=80), replace(WELL, other_memory=0.18)]


def verdict(reading: GpuReading, *, paused: bool, looks: int = 1) -> str | None:
    memory = GpuMemory()
    for _ in range(looks):
        memory = remember(memory, [reading])
    finding = judge([reading], memory, LIMITS, paused=paused)
    return finding.reason if finding else None


@pytest.mark.parametrize("paused", [False, True])
def test_a_well_device_may_work(paused: bool) -> None:
    assert verdict(WELL, paused=paused) is None


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (replace(WELL, celsius=88), "GPU 0 is at 88 °C; waiting until it is below 78 °C"),
        (replace(WELL, other_memory=0.3), "GPU 0 has 30% of its memory taken by other programs"),
        (replace(WELL, ecc_errors=1), "GPU 0 has 1 uncorrectable ECC errors"),
        (replace(WELL, xids=(31, 79)), "GPU 0 reported the critical error XID 79"),
        (GpuReading("GPU 0", problem="gone", lost=True), "GPU 0 is lost: gone"),
    ],
)
def test_above_the_upper_threshold_it_must_rest(reading: GpuReading, words: str) -> None:
    assert words in (verdict(reading, paused=False) or "")
    assert verdict(reading, paused=True) is not None


@pytest.mark.parametrize("reading", DEAD_BAND)
def test_between_the_thresholds_nothing_changes(reading: GpuReading) -> None:
    assert verdict(reading, paused=False) is None
    assert verdict(reading, paused=True) is not None


def test_a_slow_down_counts_when_it_lasts_and_until_it_ends() -> None:
    slow = replace(WELL, throttled=True)
    assert verdict(slow, paused=False, looks=9) is None
    assert "slowed down" in (verdict(slow, paused=False, looks=10) or "")
    assert verdict(slow, paused=True, looks=1) is not None


def test_what_cannot_be_read_is_not_well_after_some_looks() -> None:
    broken = GpuReading("GPU 0", problem="Unknown Error")
    assert verdict(broken, paused=False, looks=2) is None
    assert "cannot be read: Unknown Error" in (verdict(broken, paused=False, looks=3) or "")
    assert verdict(broken, paused=True, looks=1) is not None


def test_a_look_that_works_forgets_the_misses() -> None:
    broken = [GpuReading("GPU 0", problem="Unknown Error")]
    memory = remember(remember(remember(GpuMemory(), broken), broken), [WELL])
    assert remember(memory, broken).unreadable == {"GPU 0": 1}


def test_an_error_of_the_program_is_none_of_the_device() -> None:
    assert verdict(replace(WELL, xids=(13, 31, 43, 45, 68, 109)), paused=False) is None


def test_a_quantity_that_the_device_lacks_is_not_judged() -> None:
    assert verdict(GpuReading("GPU 0"), paused=False) is None


@given(st.lists(st.integers(0, 120), min_size=1))
def test_it_begins_only_above_the_upper_and_ends_only_below_the_lower(temperatures: list[int]) -> None:
    paused = False
    for celsius in temperatures:
        before, paused = paused, verdict(replace(WELL, celsius=celsius), paused=paused) is not None
        if paused != before:
            assert celsius >= LIMITS.pause_celsius if paused else celsius < LIMITS.resume_celsius


class Devices:
    def __init__(self) -> None:
        self.readings: list[GpuReading] | None = [WELL]
        self.looks = 0

    def read(self) -> list[GpuReading] | None:
        self.looks += 1
        return self.readings


def test_the_watch_keeps_the_words_of_the_first_look_and_a_critical_error_for_good() -> None:
    devices = Devices()
    watch = GpuWatch(devices, LIMITS, every=0.0)
    assert watch.look(None, 10.0) is None
    devices.readings = [replace(WELL, celsius=90)]
    hot = watch.look(None, 11.0)
    assert hot is not None
    assert (hot.cause, hot.since, hot.until, hot.mark) == (PauseCause.GPU, 11, None, "")
    devices.readings = [replace(WELL, celsius=95)]
    assert watch.look(hot, 12.0) == hot
    devices.readings = [replace(WELL, celsius=95, xids=(79,))]
    broken = watch.look(hot, 13.0)
    assert broken is not None
    assert (broken.mark, broken.since) == (LATCHED, 11)
    devices.readings = [WELL]
    assert watch.look(hot, 14.0) is None
    for readings in ([WELL], None):
        devices.readings = readings
        assert watch.look(broken, 15.0) == broken


def test_the_watch_looks_only_so_often() -> None:
    devices, now = Devices(), [0.0]
    watch = GpuWatch(devices, LIMITS, every=5.0, monotonic=lambda: now[0])
    standing = Pause("all", PauseCause.GPU, "hot", 1)
    for now[0] in (0.0, 1.0, 4.9):
        watch.look(standing, 0.0)
    assert devices.looks == 1
    now[0] = 5.0
    watch.look(standing, 0.0)
    assert devices.looks == 2
