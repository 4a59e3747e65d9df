"""Readings through the real NVML binding, of a small libnvidia-ml that is built here; see tests/nvml/fake.c."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_batch_dagster.adapters.gpu import NvmlGpus
from vllm_batch_dagster.adapters.memory import FixedClock, MemoryStore
from vllm_batch_dagster.core.gpu_health import GpuLimits, GpuReading
from vllm_batch_dagster.core.pauses import ALL, PauseCause
from vllm_batch_dagster.settings import PROJECT_ROOT
from vllm_batch_dagster.stages.pausing import PauseBoard
from vllm_batch_dagster.stages.watching import GpuWatch

SOURCE = PROJECT_ROOT / "tests" / "nvml" / "fake.c"
MINE, HW_SLOWDOWN, HEAT, BRAKE, POWER_CAP = 4242, 0x8, 0x40, 0x80, 0x4
NOT_READABLE, LOST = 999, 15
WELL = "celsius=40"
Say = Callable[..., None]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library and load it: the binding then finds it under its name. Without FAKE_NVML it has no driver."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.fail("a C compiler is needed to build the fake libnvidia-ml (Debian: apt-get install gcc libc6-dev)")
    built = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    options = ["-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([compiler, *options, "-o", built, SOURCE], check=True)
    return built


@pytest.fixture
def say(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Say]:
    """Write what the devices read from now on, a line for each; nothing at all takes the driver away."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    readings = tmp_path / "readings"
    # The C library reads its own copy of the environment, which os.environ keeps up to date.
    monkeypatch.setenv("FAKE_NVML", str(readings))

    def say(*devices: str) -> None:
        readings.write_text("".join(f"{device}\n" for device in devices))

    say(WELL)
    yield say
    say(WELL)  # an XID is news once: forget it
    NvmlGpus(set).read()


def read(gpus: NvmlGpus) -> GpuReading:
    readings = gpus.read()
    assert readings is not None
    (reading,) = readings
    return reading


def test_what_a_device_says(say: Say) -> None:
    say(f"celsius=71 total=16000 used=6000 pid={MINE} pid_used=4400 reasons={HEAT | POWER_CAP} ecc=2")
    assert read(NvmlGpus(lambda: {MINE})) == GpuReading("GPU 0 (Fake A)", 71, 0.1, True, 2)


@pytest.mark.parametrize(
    ("reasons", "throttled"), [(0, False), (POWER_CAP, False), (HW_SLOWDOWN, False), (HEAT, True), (BRAKE, True)]
)
def test_which_reasons_count_as_slowed_down(say: Say, reasons: int, throttled: bool) -> None:
    say(f"reasons={reasons}")
    assert read(NvmlGpus(set)).throttled is throttled


def test_memory_of_an_engine_that_cannot_be_told_apart_is_not_judged(say: Say) -> None:
    say("total=16000 used=12000 pid=1 pid_used=12000")
    assert read(NvmlGpus(lambda: {MINE})).other_memory is None
    assert read(NvmlGpus(set)).other_memory == 0.75


@pytest.mark.parametrize(
    ("quantity", "field"),
    [("celsius", "celsius"), ("memory", "other_memory"), ("reasons", "throttled"), ("ecc", "ecc_errors")],
)
def test_a_quantity_that_the_device_lacks_is_unknown(say: Say, quantity: str, field: str) -> None:
    say(f"no={quantity}")
    reading = read(NvmlGpus(set))
    assert (getattr(reading, field), reading.problem) == (None, "")
    others = {"celsius", "other_memory", "throttled", "ecc_errors"} - {field}
    assert all(getattr(reading, other) is not None for other in others)


def test_a_device_without_events_is_read_all_the_same(say: Say) -> None:
    say("no=events xid=79")
    assert read(NvmlGpus(set)).xids == ()


def test_an_xid_is_told_once(say: Say) -> None:
    gpus = NvmlGpus(set)
    assert read(gpus).xids == ()
    say("xid=79")
    assert read(gpus).xids == (79,)
    assert read(gpus).xids == ()


def test_a_device_that_cannot_be_read_is_tried_again(say: Say) -> None:
    gpus = NvmlGpus(set)
    read(gpus)
    say(f"error={NOT_READABLE}")
    broken = read(gpus)
    assert (bool(broken.problem), broken.lost) == (True, False)
    say(f"error={LOST}")
    assert read(gpus).lost
    say("celsius=50")
    assert read(gpus) == GpuReading("GPU 0 (Fake A)", 50, 0.0, False, 0)


def test_a_driver_that_goes_away_is_a_problem_of_every_device(say: Say) -> None:
    gpus = NvmlGpus(set)
    say(WELL, WELL)
    assert len(gpus.read() or ()) == 2
    say()
    for _ in range(3):
        assert [(each.device, bool(each.problem)) for each in gpus.read() or ()] == [
            ("GPU 0 (Fake A)", True),
            ("GPU 1 (Fake B)", True),
        ]
    say(WELL, WELL)
    assert [each.problem for each in gpus.read() or ()] == ["", ""]


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, ["Fake A", "Fake B", "Fake C"]),
        ("1", ["Fake B"]),
        ("2,0", ["Fake C", "Fake A"]),
        ("GPU-1111", ["Fake B"]),
        ("", []),
        ("-1", []),
    ],
)
def test_only_the_devices_of_the_engine_are_looked_at(say: Say, visible: str | None, devices: list[str]) -> None:
    say(WELL, WELL, WELL)
    readings = NvmlGpus(set, visible).read()
    assert [reading.device.partition("(")[2].rstrip(")") for reading in readings or ()] == devices
    assert (readings is None) is (not devices)


def test_a_machine_without_nvml_says_so_once() -> None:
    program = "from vllm_batch_dagster.adapters.gpu import NvmlGpus\ng = NvmlGpus(set)\nprint(g.read(), g.read())"
    environment = {name: value for name, value in os.environ.items() if name not in ("FAKE_NVML", "LD_LIBRARY_PATH")}
    if (found := ctypes_finds_nvml(environment)) is not None:
        pytest.skip(f"this machine has NVML: {found}")
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "None None\n"
    assert run.stderr.count("the GPU health gate is off, because NVML is not there") == 1


def ctypes_finds_nvml(environment: dict[str, str]) -> str | None:
    program = "import ctypes\nctypes.CDLL('libnvidia-ml.so.1')"
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    return None if run.returncode else "libnvidia-ml.so.1"


def test_the_gate_from_the_library_to_the_store(say: Say) -> None:
    """Too hot, the dead band, cool; a critical error that only an operator ends."""
    store, clock = MemoryStore(), FixedClock()
    watch = GpuWatch(NvmlGpus(set), GpuLimits(), every=0.0)
    board = PauseBoard(store.pauses, clock, kept=[watch])

    def reasons() -> list[str]:
        standing = list(board.standing())
        assert standing == list(store.pauses.list()), "others read it in the store"
        return [pause.reason for pause in standing]

    assert reasons() == []
    say("celsius=91")
    (hot,) = reasons()
    assert hot == "GPU 0 (Fake A) is at 91 °C; waiting until it is below 78 °C"
    say("celsius=80")
    assert reasons() == [hot]
    say("celsius=77")
    assert reasons() == []
    say("celsius=80")
    assert reasons() == []
    say("celsius=40 xid=79")
    assert "XID 79" in reasons()[0]
    say("celsius=40")
    assert "XID 79" in reasons()[0]
    store.pauses.remove(ALL, PauseCause.GPU)
    assert reasons() == []
    say("celsius=40 ecc=1")
    assert "uncorrectable ECC" in reasons()[0]
    say(f"error={NOT_READABLE}")
    assert "uncorrectable ECC" in reasons()[0], "what cannot be read does not end a pause"
    say("celsius=40")
    assert reasons() == []
    say(f"error={NOT_READABLE}")
    assert [len(reasons()) for _ in range(3)] == [0, 0, 1]
