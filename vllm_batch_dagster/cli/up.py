"""`vllm-batch up`: the whole stack as one supervised group, in this terminal or detached from it."""

import os
import sys
import time
from contextlib import ExitStack
from typing import Annotated

import typer

from vllm_batch_dagster.cli.banner import banner
from vllm_batch_dagster.cli.console import fail
from vllm_batch_dagster.cli.detach import start_detached
from vllm_batch_dagster.cli.engine_end import end_engine
from vllm_batch_dagster.cli.group_log import FileFollower, GroupLog
from vllm_batch_dagster.cli.preflight import check_before_start
from vllm_batch_dagster.cli.preparation import prepare_state
from vllm_batch_dagster.cli.processes import kill_processes, stack_processes, stop_processes
from vllm_batch_dagster.cli.services import stack_environment, stack_services
from vllm_batch_dagster.cli.signals import StopSignals
from vllm_batch_dagster.cli.state_folder import (
    StackRecord,
    hold_stack,
    make_state_folder,
    write_record,
)
from vllm_batch_dagster.cli.supervisor import Supervisor
from vllm_batch_dagster.settings import Settings, load_settings

LEFTOVER_GRACE_SECONDS = 10.0


def up(
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when everything is ready; logs go to files.")
    ] = False,
    background: Annotated[bool, typer.Option("--background", hidden=True)] = False,
) -> None:
    """Start the API, the Dagster UI, its daemon and the code server; Ctrl-C stops all of it."""
    settings = load_settings()
    make_state_folder(settings.vllm_batch_home)
    raise typer.Exit(start_detached(settings) if detach else _run(settings, is_quiet=background))


def _run(settings: Settings, *, is_quiet: bool) -> int:
    began = time.time()
    signals = StopSignals()
    signals.install()
    with hold_stack(settings.vllm_batch_home):
        _clear_leftovers(settings)
        check_before_start(settings)
        prepare_state(settings)
        failure = _supervise(settings, signals, began, is_quiet=is_quiet)
    return fail(failure) if failure else 0


def _clear_leftovers(settings: Settings) -> None:
    """End what an `up` that was killed left behind: it would hold our ports and databases."""
    left = stack_processes(settings.vllm_batch_home)
    if left:
        typer.echo(f"Stopping {len(left)} processes that an earlier `up` left behind.")
        stop_processes(left, LEFTOVER_GRACE_SECONDS)


def _supervise(settings: Settings, signals: StopSignals, began: float, *, is_quiet: bool) -> str | None:
    services = stack_services(settings)
    colours = {**{service.name: service.colour for service in services}, "engine": "cyan"}
    log = GroupLog(settings.log_folder, None if is_quiet else sys.stdout, colours)
    follower = FileFollower(log, "engine", settings.engine_folder / "engine.log")
    announcer = Announcer(settings, log, began)
    supervisor = Supervisor(services, stack_environment(settings), log, signals, announcer.announce)
    with ExitStack() as ending:  # runs from the last to the first, each also when one before it fails
        ending.callback(log.close)
        follower.start()
        ending.callback(follower.stop)
        ending.callback(lambda: kill_processes(stack_processes(settings.vllm_batch_home)))
        ending.callback(end_engine, settings.engine_folder, lambda: signals.is_hurried)
        ending.callback(supervisor.stop)
        ending.callback(log.show, "up", "stopping")
        return supervisor.run()


class Announcer:
    """Keeps the record of the stack current and says once that everything is ready."""

    def __init__(self, settings: Settings, log: GroupLog, began: float) -> None:
        self._settings = settings
        self._log = log
        self._began = began
        self._is_told = False

    def announce(self, supervisor: Supervisor) -> None:
        record = StackRecord(
            pid=os.getpid(),
            started_at=self._began,
            is_ready=supervisor.is_ready,
            services=supervisor.records(),
        )
        write_record(self._settings.vllm_batch_home, record)
        if supervisor.is_ready and not self._is_told:
            self._is_told = True
            for line in banner(self._settings, time.time() - self._began, is_detached=False):
                self._log.show("up", line)
