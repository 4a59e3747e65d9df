"""Asks a service whether it is ready. Every probe answers in a few seconds and never raises."""

import http.client
import json
import socket
import urllib.error
import urllib.request
from typing import Any

PROBE_SECONDS = 3.0
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
