"""The services of the stack: what each runs, what it waits for, and how to tell that it is ready. Pure."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from vllm_batch_dagster.cli.addresses import Address, listening_addresses
from vllm_batch_dagster.cli.installation import find_shipped_file
from vllm_batch_dagster.cli.processes import STACK_VARIABLE
from vllm_batch_dagster.cli.readiness import accepts_connections, answers, can_start_runs, daemons_beat
from vllm_batch_dagster.settings import Settings

DEFINITIONS = "vllm_batch_dagster.definitions"
# A tick must also survive a machine that a batch keeps busy.
SENSOR_SECONDS = 120
# Calls in flight when the code server is stopped; runs have ended before (supervisor.py).
CODE_SERVER_GRACE_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Service:
    """One process of the stack. `is_ready` gets the time of its start in unix seconds; `is_alive` says of a ready one
    whether it still does its work."""

    name: str
    arguments: tuple[str, ...]
    colour: str
    after: tuple[str, ...]
    is_ready: Callable[[float], bool]
    is_alive: Callable[[], bool] | None = None


def stack_services(settings: Settings) -> tuple[Service, ...]:
    """Return the services in start order. They are stopped in the reverse one."""
    code, web, api = listening_addresses(settings)
    return (_code_server(code), _webserver(web), _daemon(web), _api(api))


def _code_server(address: Address) -> Service:
    # `dagster code-server` would add a second process, a socket in the temporary folder and the reload button,
    # and would go on when the graph does not load (docs/operations.md).
    arguments = ("-m", "dagster", "api", "grpc", "-m", DEFINITIONS, "-h", address.host, "-p", str(address.port))
    return Service(
        "code",
        arguments,
        "yellow",
        (),
        lambda _: accepts_connections(address.host, address.port),
        lambda: can_start_runs(address.host, address.port),
    )


def _webserver(address: Address) -> Service:
    workspace = str(find_shipped_file("workspace.yaml"))
    arguments = ("-m", "dagster_webserver", "-h", address.host, "-p", str(address.port), "-w", workspace)
    is_alive = partial(answers, f"{address.url}/server_info")
    return Service("web", arguments, "magenta", ("code",), lambda _: is_alive(), is_alive)


def _daemon(web: Address) -> Service:
    workspace = str(find_shipped_file("workspace.yaml"))
    arguments = ("-m", "dagster._daemon", "run", "-w", workspace)
    return Service("daemon", arguments, "blue", ("code",), lambda since: daemons_beat(web.url, since))


def _api(address: Address) -> Service:
    is_alive = partial(answers, f"{address.url}/health")
    return Service("api", ("-m", "api_shim"), "green", (), lambda _: is_alive(), is_alive)


def command_line(service: Service) -> list[str]:
    """Return the command that starts `service` as a child of this process and dies with it."""
    leash = (sys.executable, "-m", "vllm_batch_dagster.cli.leash", str(os.getpid()))
    return [*leash, sys.executable, *service.arguments]


def stack_environment(settings: Settings) -> Mapping[str, str]:
    """Return the environment of every service: ours, and what ties it to this stack."""
    code = listening_addresses(settings)[0]
    return {
        **os.environ,
        "VLLM_BATCH_HOME": str(settings.vllm_batch_home),
        "DAGSTER_HOME": str(settings.dagster_home),
        "CODE_SERVER_HOST": code.host,
        "CODE_SERVER_PORT": str(code.port),
        "DAGSTER_SENSOR_GRPC_TIMEOUT_SECONDS": str(SENSOR_SECONDS),
        "DAGSTER_GRPC_SHUTDOWN_GRACE_PERIOD": str(CODE_SERVER_GRACE_SECONDS),
        "PYTHONUNBUFFERED": "1",
        STACK_VARIABLE: str(settings.vllm_batch_home),
    }
