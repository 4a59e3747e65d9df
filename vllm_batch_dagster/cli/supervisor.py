"""Runs the services as one group: starts them in order, starts again what dies, stops all when we are told to.

In: the services of the stack. Out: a sentence when something went wrong, and nothing left running. Called by `up`.

A service that was ready and dies is started again with a growing pause: what it had promised is on disk, and the others
wait for it (docs/reliability.md). One that dies before it was ever ready, or again and again, ends the stack: then a
person has to look.
"""

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_batch_dagster.cli.group_log import GroupLog, pump
from vllm_batch_dagster.cli.processes import (
    STACK_VARIABLE,
    kill_group,
    orphaned_workers,
    run_workers,
    stop_processes,
    wait_until,
)
from vllm_batch_dagster.cli.pulse import Check, Pulse
from vllm_batch_dagster.cli.services import Service, command_line
from vllm_batch_dagster.cli.signals import StopSignals
from vllm_batch_dagster.cli.state_folder import ServiceRecord

POLL_SECONDS = 0.1
PROBE_PAUSE_SECONDS = 0.2
READY_SECONDS = 180
# Services that are up are asked this often, and killed when they have not answered for so long. Not sooner: while
# batches keep the machine busy, one may just be slow.
PULSE_SECONDS = 10.0
SILENT_SECONDS = 120.0
# Restarts of one service in a row. A service that has lived STEADY_SECONDS begins a new row.
MOST_RESTARTS = 5
STEADY_SECONDS = 60.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
# A run that is told to end finishes its journal and its event log; the code server then has nothing to wait for.
WORKER_GRACE_SECONDS = 20.0
SERVICE_GRACE_SECONDS = 15.0
# What a service said last may still be on its way to the log: of a dead one until its pipe is at its end, which a
# child that it leaves behind keeps open.
LAST_WORDS_SECONDS, LIVING_WORDS_SECONDS = 5.0, 0.3


@dataclass(slots=True)
class Running:
    """A started service. `deaths` in a row; `again_at` (monotonic) is when a dead one is due; `earlier` are the pids,
    and so the process groups, of its earlier lives."""

    service: Service
    process: subprocess.Popen[bytes]
    pump: threading.Thread
    started_at: float
    is_ready: bool = False
    was_ready: bool = False
    probed_at: float = 0.0
    deaths: int = 0
    again_at: float | None = None
    earlier: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.service.name


class Supervisor:
    """One run of the stack."""

    def __init__(
        self,
        services: tuple[Service, ...],
        environment: Mapping[str, str],
        log: GroupLog,
        signals: StopSignals,
        on_change: Callable[["Supervisor"], None],
    ) -> None:
        """`on_change` is called after every start and when a service becomes ready."""
        self._waiting = list(services)
        self._environment = environment
        self._log = log
        self._signals = signals
        self._on_change = on_change
        self._running: list[Running] = []
        self._pulse = Pulse(self._checks, PULSE_SECONDS)

    @property
    def is_ready(self) -> bool:
        return not self._waiting and all(running.is_ready for running in self._running)

    def records(self) -> list[ServiceRecord]:
        return [ServiceRecord(r.name, r.process.pid, r.started_at) for r in self._running]

    def run(self) -> str | None:
        """Start everything and keep it alive. Returns what went wrong for good, None when a signal ended it."""
        self._pulse.start()
        while not self._signals.is_stopping:
            self._start_due()
            self._restart_due()
            self._kill_silent()
            if failure := self._find_death() or self._find_delay():
                return failure
            self._probe()
            time.sleep(POLL_SECONDS)
        return None

    def stop(self) -> None:
        """Stop in reverse order of start, each with its whole process group."""
        self._pulse.stop()
        for running in reversed(self._running):
            if running.name == "code":
                self._stop_runs(running)
            self._stop(running)

    def _start_due(self) -> None:
        ready = {running.name for running in self._running if running.is_ready}
        for service in [s for s in self._waiting if ready.issuperset(s.after)]:
            self._waiting.remove(service)
            self._start(service)

    def _start(self, service: Service) -> None:
        self._running.append(Running(service, *self._spawn(service), time.time()))
        self._on_change(self)

    def _restart_due(self) -> None:
        for running in self._running:
            if running.again_at is None or time.monotonic() < running.again_at:
                continue
            running.earlier.append(running.process.pid)
            running.process, running.pump = self._spawn(running.service)
            running.started_at = time.time()
            running.again_at = None
            self._on_change(self)

    def _spawn(self, service: Service) -> tuple["subprocess.Popen[bytes]", threading.Thread]:
        process = subprocess.Popen(
            command_line(service),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A group of its own: Ctrl-C reaches `up` alone, which stops the services in order.
            start_new_session=True,
        )
        assert process.stdout is not None
        return process, pump(self._log, service.name, process.stdout)

    def _probe(self) -> None:
        for running in self._running:
            if running.is_ready or running.again_at or time.monotonic() - running.probed_at < PROBE_PAUSE_SECONDS:
                continue
            running.probed_at = time.monotonic()
            if running.service.is_ready(running.started_at):
                running.is_ready = running.was_ready = True
                if running.deaths:
                    self._log.add(running.name, "ready again")
                self._on_change(self)

    def _checks(self) -> list[Check]:
        return [
            (running.name, running.service.is_alive)
            for running in list(self._running)
            if running.is_ready and running.service.is_alive is not None
        ]

    def _kill_silent(self) -> None:
        """End services that are up and do not answer: one more death."""
        for running in self._running:
            if running.is_ready and self._pulse.silent_seconds(running.name) >= SILENT_SECONDS:
                self._log.add(running.name, f"this service has not answered for {SILENT_SECONDS:.0f} s and is killed")
                running.process.kill()
                running.process.wait()
                self._pulse.forget(running.name)

    def _find_death(self) -> str | None:
        """Note who has died. Returns a sentence when it must not be started again."""
        for running in self._running:
            code = running.process.poll()
            if code is None or running.again_at is not None:
                continue
            if not running.was_ready:
                return self._describe(running, describe_exit(code))
            if failure := self._note_death(running, describe_exit(code)):
                return failure
        return None

    def _note_death(self, running: Running, how: str) -> str | None:
        """Plan the restart of a service that was ready before. Returns a sentence when it has had enough of them."""
        running.is_ready = False
        running.deaths = 1 if time.time() - running.started_at >= STEADY_SECONDS else running.deaths + 1
        if running.deaths > MOST_RESTARTS:
            return self._describe(running, f"{how}, its death number {running.deaths} in a row, and is given up")
        if running.name != "code":  # the runs of a code server are on in its group, and finish
            kill_group(running.process.pid)
        pause = pause_before(running.deaths)
        running.again_at = time.monotonic() + pause
        self._log.add(running.name, f"this service {how}; it is started again in {pause:.1f} s")
        self._on_change(self)
        return None

    def _find_delay(self) -> str | None:
        """Kill what should be ready again by now: one more death. Returns a sentence when it never was ready."""
        for running in self._running:
            if running.is_ready or running.again_at or time.time() - running.started_at <= READY_SECONDS:
                continue
            if not running.was_ready:
                return self._describe(running, f"was not ready after {READY_SECONDS} s")
            running.process.kill()
            running.process.wait()
        return None

    def _describe(self, running: Running, what: str) -> str:
        running.pump.join(LIVING_WORDS_SECONDS if running.process.poll() is None else LAST_WORDS_SECONDS)
        words = "".join(f"\n    {line}" for line in self._log.recent(running.name)) or " (nothing)"
        path = self._log.path(running.name)
        return f"the service {running.name} {what}; its last words, more of them in {path}:{words}"

    def _stop_runs(self, code_server: Running) -> None:
        workers = run_workers(code_server.process.pid)
        if code_server.earlier:
            workers += orphaned_workers(Path(self._environment[STACK_VARIABLE]), code_server.earlier)
        stop_processes(workers, WORKER_GRACE_SECONDS, lambda: self._signals.is_hurried)

    def _stop(self, running: Running) -> None:
        process = running.process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: process.poll() is not None or self._signals.is_hurried, SERVICE_GRACE_SECONDS)
        kill_group(process.pid)
        process.wait()


def pause_before(deaths: int) -> float:
    """Return how long (seconds) to wait before a service that died this often in a row is started again."""
    return float(min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (deaths - 1)))


def describe_exit(code: int) -> str:
    """Return how a process ended, from its return code as subprocess gives it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
