"""Runs the services as one group: starts them in order, watches them, stops all when one dies or we are told to.

In: the services of the stack. Out: a sentence when something went wrong, and nothing left running. Called by `up`.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_batch_dagster.cli.group_log import GroupLog, pump
from vllm_batch_dagster.cli.processes import (
    kill_group,
    run_workers,
    stop_processes,
    wait_until,
)
from vllm_batch_dagster.cli.services import Service, command_line
from vllm_batch_dagster.cli.signals import StopSignals
from vllm_batch_dagster.cli.state_folder import ServiceRecord

POLL_SECONDS = 0.1
PROBE_PAUSE_SECONDS = 0.2
READY_SECONDS = 180
# A run that is told to end finishes its journal and its event log; the code server then has nothing to wait for.
WORKER_GRACE_SECONDS = 20.0
SERVICE_GRACE_SECONDS = 15.0


@dataclass(slots=True)
class Running:
    """A started service."""

    service: Service
    process: subprocess.Popen[bytes]
    started_at: float
    is_ready: bool = False
    probed_at: float = 0.0

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

    @property
    def is_ready(self) -> bool:
        return not self._waiting and all(running.is_ready for running in self._running)

    def records(self) -> list[ServiceRecord]:
        return [ServiceRecord(r.name, r.process.pid, r.started_at) for r in self._running]

    def run(self) -> str | None:
        """Start everything and watch it. Returns what went wrong, None when a signal ended it."""
        while not self._signals.is_stopping:
            self._start_due()
            if failure := self._find_death() or self._find_delay():
                return failure
            self._probe()
            time.sleep(POLL_SECONDS)
        return None

    def stop(self) -> None:
        """Stop in reverse order of start, each with its whole process group."""
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
        process = subprocess.Popen(
            command_line(service),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A group of its own: Ctrl-C reaches `up` alone, which stops the services in order.
            start_new_session=True,
        )
        if process.stdout is not None:
            pump(self._log, service.name, process.stdout)
        self._running.append(Running(service, process, time.time()))
        self._on_change(self)

    def _probe(self) -> None:
        for running in self._running:
            if running.is_ready or time.monotonic() - running.probed_at < PROBE_PAUSE_SECONDS:
                continue
            running.probed_at = time.monotonic()
            if running.service.is_ready(running.started_at):
                running.is_ready = True
                self._on_change(self)

    def _find_death(self) -> str | None:
        for running in self._running:
            code = running.process.poll()
            if code is not None:
                return self._describe(running, describe_exit(code))
        return None

    def _find_delay(self) -> str | None:
        for running in self._running:
            if not running.is_ready and time.time() - running.started_at > READY_SECONDS:
                return self._describe(running, f"was not ready after {READY_SECONDS} s")
        return None

    def _describe(self, running: Running, what: str) -> str:
        # The pump may still hold the last words of a process that is gone.
        wait_until(lambda: False, 0.3)
        words = "".join(f"\n    {line}" for line in self._log.recent(running.name)) or " (nothing)"
        path = self._log.path(running.name)
        return f"the service {running.name} {what}; its last words, more of them in {path}:{words}"

    def _stop_runs(self, code_server: Running) -> None:
        stop_processes(run_workers(code_server.process.pid), WORKER_GRACE_SECONDS, lambda: self._signals.is_hurried)

    def _stop(self, running: Running) -> None:
        process = running.process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: process.poll() is not None or self._signals.is_hurried, SERVICE_GRACE_SECONDS)
        kill_group(process.pid)
        process.wait()


def describe_exit(code: int) -> str:
    """Return how a process ended, from its return code as subprocess gives it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
