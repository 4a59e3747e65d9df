"""Where the services listen and whether that is free. Used by `up` before it starts, by `doctor` and `status`."""

import socket
from dataclasses import dataclass

import psutil

from vllm_batch_dagster.settings import LOOPBACK, Settings, local_url


@dataclass(frozen=True, slots=True)
class Address:
    """A place where one of our services listens, and the settings that decide it."""

    service: str
    host: str
    port: int
    setting: str

    @property
    def url(self) -> str:
        """How a client on this machine reaches it."""
        return local_url(self.host, self.port)


def listening_addresses(settings: Settings) -> tuple[Address, ...]:
    """Return the addresses that the stack takes, in start order."""
    return (
        Address("code", LOOPBACK, settings.code_server_port, "CODE_SERVER_PORT"),
        Address("web", settings.dagster_host, settings.dagster_port, "DAGSTER_PORT"),
        Address("api", settings.api_host, settings.api_port, "API_PORT"),
    )


def is_free(host: str, port: int) -> bool:
    """True when a server may listen there now.

    Without SO_REUSEPORT: with it a second Dagster code server shares the port of the first in silence.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def port_owner(port: int) -> str:
    """Return `name, pid n` of the process that listens on `port`; empty when the system does not tell us."""
    try:
        listeners = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:
        return ""
    for connection in listeners:
        if connection.laddr and connection.laddr.port == port and connection.pid:
            return _describe(connection.pid)
    return ""


def _describe(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).name()}, pid {pid}"
    except psutil.Error:
        return f"pid {pid}"


def describe_conflict(address: Address) -> tuple[str, str]:
    """Return the fault of a taken port, with who has it, and the mend."""
    owner = port_owner(address.port)
    by_whom = f" by {owner}" if owner else ""
    return (
        f"port {address.port} of the service {address.service} is already used{by_whom}",
        f"stop that process or set {address.setting} to a free port",
    )
