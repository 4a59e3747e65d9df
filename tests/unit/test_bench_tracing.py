"""Memory over time: growth counts from the first chunk on, and a process that ends is no error."""

import os
import subprocess
import sys
import time

import psutil

from bench.scenarios.million import newest
from bench.tracing import MemoryTraces, Trace


def test_growth_is_the_most_after_a_moment_less_the_most_before() -> None:
    trace = Trace([(1.0, 100.0), (2.0, 130.0), (3.0, 120.0), (4.0, 145.0), (5.0, 90.0)])
    assert trace.peak == 145.0
    assert trace.growth_after(3.0) == 15.0
    assert trace.growth_after(4.0) == 0.0
    assert trace.growth_after(9.0) == 0.0
    assert Trace().growth_after(1.0) == 0.0


def test_services_and_workers_are_traced_and_the_first_chunk_is_noted() -> None:
    code = "print('up', flush=True); input()"
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process = psutil.Process(worker.pid)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"up\n"  # by now it holds a whole interpreter
        traces = MemoryTraces({"me": os.getpid()}, lambda: process, lambda: bool(traces.workers))
        with traces:
            deadline = time.monotonic() + 30
            while not (traces.first_chunk and traces.workers) and time.monotonic() < deadline:
                time.sleep(0.05)
            worker.kill()
            worker.wait()
            looks = len(traces.services["me"].samples)
            while len(traces.services["me"].samples) < looks + 2 and time.monotonic() < deadline:
                time.sleep(0.05)  # a whole look at one that has ended
    finally:
        worker.kill()
        worker.wait()
    assert traces.first_chunk > 0
    assert traces.services["me"].peak > 1
    assert [trace.peak > 1 for trace in traces.workers.values()] == [True]


def test_the_newest_worker_is_the_one_that_began_last() -> None:
    assert newest([]) is None
    assert newest([psutil.Process()]) == psutil.Process()
