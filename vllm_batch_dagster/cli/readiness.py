"""Asks a service whether it is ready. Every probe answers in a few seconds and never raises."""

import http.client
import json
import socket
import urllib.error
import urllib.request
from typing import Any

PROBE_SECONDS = 3.0
PULSE_TIMEOUT_SECONDS = 10.0
# Dagster's daemons write a heartbeat every 30 s.
HEARTBEAT_SECONDS = 180.0

_DAEMONS = "{instance{daemonHealth{allDaemonStatuses{daemonType required lastHeartbeatTime}}}}"

# Proxies of the environment are not meant for our own machine.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def accepts_connections(host: str, port: int) -> bool:
    """True when something listens. Dagster's code server listens only after it has loaded the graph."""
    try:
        socket.create_connection((host, port), PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def can_start_runs(host: str, port: int) -> bool:
    """True when Dagster's code server answers a question for which it needs the lock behind which it starts runs.

    The call is `CanCancelExecution` of a run that does not exist, encoded by hand (one text field): Dagster's own
    client would cost this process a second and 80 MB.
    """
    import grpc

    question = json.dumps({"__class__": "CanCancelExecutionRequest", "run_id": "pulse"}).encode()
    message = b"\x0a" + bytes([len(question)]) + question
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/api.DagsterApi/CanCancelExecution")(message, timeout=PULSE_TIMEOUT_SECONDS)
        except grpc.RpcError:
            return False
    return True


def answers(url: str) -> bool:
    """True when a GET of `url` gives 200."""
    try:
        with _direct.open(url, timeout=PROBE_SECONDS) as response:
            return bool(response.status == http.client.OK)
    except (OSError, http.client.HTTPException):
        return False


def daemons_beat(dagster_url: str, since: float) -> bool:
    """True when every daemon that Dagster requires has sent a heartbeat after `since` (unix seconds)."""
    beats = [status["lastHeartbeatTime"] or 0.0 for status in _daemon_statuses(dagster_url) if status["required"]]
    return bool(beats) and min(beats) >= since


def _daemon_statuses(dagster_url: str) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{dagster_url}/graphql",
        data=json.dumps({"query": _DAEMONS}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with _direct.open(request, timeout=PROBE_SECONDS) as response:
            answer = json.load(response)
        statuses: list[dict[str, Any]] = answer["data"]["instance"]["daemonHealth"]["allDaemonStatuses"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return []
    return statuses
