"""Serves the API with uvicorn: settings in, a process that listens until a signal. Called by __main__.py."""

import ipaddress
import logging
import signal
import socket
import sys
import time

import structlog
import uvicorn
from fastapi import FastAPI
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import ExceptionRenderer
from structlog.tracebacks import ExceptionDictTransformer

from api_shim.app import create_app
from api_shim.protocol import BodyProtocol
from vllm_batch_dagster.composition import build_catalog, build_files, build_store, build_workspace
from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.settings import Settings

KEEP_ALIVE_SECONDS = 75  # longer than a minute's polling, so that pollers keep their connection
SHUTDOWN_SECONDS = 5
BACKLOG = 2048


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM, then raise KeyboardInterrupt. Main thread only.

    Raises ConfigurationError (address, model catalogue, port), StorageFailure.
    """
    configure_logs(settings.log_format)
    if not settings.api_allow_remote and not is_loopback(settings.api_host):
        refuse_remote(settings.api_host, build_store(settings))
    catalog = build_catalog(settings)
    listener = bind_listener(settings.api_host, settings.api_port)
    store = build_store(settings)
    has_keys = bool(store.keys.list())
    app = create_app(settings, store, build_files(settings), build_workspace(settings), catalog, time.time)
    # uvicorn raises the signal again when it has stopped; SIGTERM's default would make a clean stop look like a crash.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    url = f"http://{settings.api_host}:{settings.api_port}"
    structlog.get_logger("api").info("listening", url=url, access=describe_access(settings.api_host, has_keys))
    uvicorn.Server(make_config(app)).run(sockets=[listener])


def make_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves us: no log of its own, since api_shim/middleware.py writes a line per request."""
    return uvicorn.Config(
        app,
        http=BodyProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


def refuse_remote(host: str, store: BatchStore) -> None:
    """Raises ConfigurationError for the address of other machines as long as there are no keys."""
    if not store.keys.list():
        raise ConfigurationError(
            f"API_HOST={host} would open the API to other machines, and it has no keys yet. Make one with "
            "`vllm-batch keys create --project NAME`, or set API_HOST=127.0.0.1; or set API_ALLOW_REMOTE=true where "
            "something else keeps strangers out."
        )


def describe_access(host: str, has_keys: bool) -> str:
    """Return who is served, for the log."""
    if has_keys:
        return "with a key only"
    whom = "every program of this machine, and no other machine" if is_loopback(host) else "ANYBODY WHO REACHES IT"
    return f"no key exists, so it serves {whom}; make one with `vllm-batch keys create --project NAME`"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigurationError when the port is taken or not allowed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as failure:
        listener.close()
        raise ConfigurationError(
            f"The API cannot listen on {host}:{port}: {failure.strerror}. Stop what uses it, or set API_PORT."
        ) from failure
    return listener


def configure_logs(log_format: str) -> None:
    """One line per event on stderr, ours and uvicorn's. Tracebacks without local variables: keys are among them."""
    as_json = log_format == "json"
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *(
                (ExceptionRenderer(ExceptionDictTransformer(show_locals=False)), structlog.processors.JSONRenderer())
                if as_json
                else (ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain_traceback),)
            ),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
