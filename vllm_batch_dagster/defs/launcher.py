"""Launches runs like Dagster's own launcher and notices a run worker that died with its code server.

In: a run that Dagster's monitoring daemon believes alive. Out: RUNNING or FAILED. Named in dagster.yaml,
loaded by the webserver and the daemon. The stock launcher has no health check, so after a machine crash its
runs stay STARTED for ever (docs/operations.md, "Dead workers").
"""

import json
from collections.abc import Mapping
from typing import Any, Self

import psutil
from dagster import DagsterEventType, DagsterRun, DefaultRunLauncher, Field
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._grpc.client import DagsterGrpcClient
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import ConfigurableClassData, deserialize_value

DEFAULT_MISSES = 2
# Two minutes at the pace of dagster.yaml, for a code server that died with its worker to come back: Dagster asks it for
# the plan of the retry, once, and gives the retry up for good when it is away (dagster 1.13, `auto_run_reexecution`).
PATIENT_MISSES = 24
ASK_SECONDS = 5
# A stepped clock moves what the system says about a start; a pid is not used again within a minute.
CLOCK_SLACK_SECONDS = 60.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
WORKER_STARTED = "Started process for run"


class CheckedRunLauncher(DefaultRunLauncher):
    """A DefaultRunLauncher whose runs fail when their worker is gone.

    A worker counts as gone after `misses` checks in a row in which its code server does not claim the run
    and, where the worker runs on this machine, its process does not exist. Dagster then retries the run.

    Where server and worker belong to this machine, a process that is not seen is gone, whatever is said: the server's
    look after its workers ends with the first error it meets, a full disk say, and then it claims every worker for ever
    (dagster 1.13, `_check_for_orphaned_runs`). A pid of another machine says nothing here.
    """

    def __init__(self, inst_data: ConfigurableClassData | None = None, misses: int = DEFAULT_MISSES) -> None:
        super().__init__(inst_data)
        self._limit = misses
        self._misses: dict[str, int] = {}

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {"misses": Field(int, is_required=False, default_value=DEFAULT_MISSES)}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        return cls(inst_data, misses=config_value["misses"])

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Return RUNNING while anybody vouches for the worker of `run`, FAILED after enough misses.

        The server is asked only for a worker whose process is not seen here: it answers behind a lock that it shares
        with the worker, and every launch waits there too while that lock is not had.
        """
        address = _server_address(run)
        if address is None:
            return self._miss(run, self._limit)
        worker = self.worker_start(run) if address["host"] in LOOPBACK else None
        if worker is not None and is_running(*worker):
            return self._forgive(run)
        claim = _ask_server(run, address)
        if claim and (worker is None or not listens_here(address["port"])):
            return self._forgive(run)
        return self._miss(run, self._limit if claim is not None else max(self._limit, PATIENT_MISSES))

    def _forgive(self, run: DagsterRun) -> CheckRunHealthResult:
        self._misses.pop(run.run_id, None)
        return CheckRunHealthResult(WorkerStatus.RUNNING)

    def _miss(self, run: DagsterRun, limit: int) -> CheckRunHealthResult:
        seen = self._misses[run.run_id] = self._misses.get(run.run_id, 0) + 1
        if seen < limit:
            return CheckRunHealthResult(WorkerStatus.RUNNING, f"worker not found ({seen} of {limit})")
        del self._misses[run.run_id]
        return CheckRunHealthResult(
            WorkerStatus.FAILED, "its code server does not know the run and its process is gone"
        )

    def worker_start(self, run: DagsterRun) -> tuple[int, float] | None:
        """The pid that the worker wrote into the run's log, and when (unix seconds)."""
        for entry in self._instance.all_logs(run.run_id, of_type=DagsterEventType.ENGINE_EVENT):
            event = entry.dagster_event
            if event is None or not (event.message or "").startswith(WORKER_STARTED):
                continue
            return int(str(event.engine_event_data.metadata["pid"].value)), entry.timestamp
        return None


def _server_address(run: DagsterRun) -> dict[str, Any] | None:
    """Where the run's code server listens, as DefaultRunLauncher recorded it. None before the launch."""
    if GRPC_INFO_TAG not in run.tags:
        return None
    recorded = json.loads(run.tags[GRPC_INFO_TAG])
    return {
        "host": recorded.get("host"),
        "port": recorded.get("port"),
        "socket": recorded.get("socket"),
        "use_ssl": bool(recorded.get("use_ssl", False)),
    }


def _ask_server(run: DagsterRun, address: Mapping[str, Any]) -> bool | None:
    """Ask the code server that launched the run whether it could cancel it: only then does it hold it. None: it does
    not answer."""
    client = DagsterGrpcClient(**address)
    try:
        reply = client.can_cancel_execution(CanCancelExecutionRequest(run_id=run.run_id), timeout=ASK_SECONDS)
    except DagsterUserCodeUnreachableError:
        return None
    return deserialize_value(reply, CanCancelExecutionResult).can_cancel


def is_running(pid: int, started_before: float) -> bool:
    """True when `pid` exists, is no zombie, and is as old as `started_before` (unix seconds): not reused."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(process.create_time() <= started_before + CLOCK_SLACK_SECONDS)
    except psutil.NoSuchProcess:
        return False


def listens_here(port: int) -> bool:
    """True when a process that we can see listens on `port`: so it is not in another container. Where we may not look
    (macOS, another user), False."""
    try:
        sockets = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return False
    return any(each.laddr[1:] == (port,) and each.pid for each in sockets if each.status == psutil.CONN_LISTEN)
