"""The server that the conformance suite and the real clients talk to: one that the caller names, or our own stack."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import httpx2
import pytest

from tests.dagster_ui import DagsterUi
from tests.ports import hold_ports
from tests.stack import START_SECONDS, Stack, wait_for
from vllm_batch_dagster.adapters.simulated.process import SimulatedProcess

CHAT, EMBEDDINGS, SLOW = "made-up-chat", "made-up-embeddings", "made-up-slow"
README_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
SLOW_SECONDS = "1"
ENGINE_RUNS = 2  # the slow batch that is cut must not hold up the others
VARIABLE = "CONFORMANCE_"

POOL_LIMIT = 'mutation ($limit: Int!) { setConcurrencyLimit(concurrencyKey: "engine", limit: $limit) }'
# `python -m api_shim` whose clock is an hour and a minute ahead.
LATER_API = (
    "import runpy, time; now = time.time; time.time = lambda: now() + 3660; "
    "runpy.run_module('api_shim', run_name='__main__')"
)


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test, in the words of its options. Every URL ends with /v1."""

    base_url: str = ""
    """The server."""
    api_key: str = ""
    """A key of it."""
    model: str = ""
    """A chat model."""
    embedding_model: str = ""
    """A model of another kind, for embeddings and scores."""
    slow_model: str = ""
    """A chat model that takes more than a minute for 1,000 lines of 16 tokens."""
    extended_url: str = ""
    """The same product with its extensions on: windows of one minute, and lenient validation."""
    extended_key: str = ""
    """A key of that server."""
    later_url: str = ""
    """The server as it will be in an hour: the same files, a clock that is an hour and a minute ahead."""
    limited_url: str = ""
    """The server with a limit of fewer than 200 requests a minute."""
    max_file_bytes: str = str(200 << 20)
    """The largest file that the server takes."""

    def need(self, name: str) -> str:
        """Return a property that this number cannot do without."""
        value = str(getattr(self, name))
        if not value:
            pytest.fail(f"this number needs --{name.replace('_', '-')} (docs/conformance.md)")
        return value


def add_options(parser: pytest.Parser) -> None:
    """One option for each property, with a variable as its default."""
    group = parser.getgroup("conformance", "server under test; without --base-url our own stack is started")
    for field in fields(Target):
        default = os.environ.get(VARIABLE + field.name.upper(), "")
        group.addoption("--" + field.name.replace("_", "-"), dest=field.name, default=default)


def read_options(config: pytest.Config) -> Target:
    """Return the server that the caller names. Without a base URL, none is named."""
    given = {field.name: str(config.getoption(field.name)) for field in fields(Target)}
    named = {name: value for name, value in given.items() if value}
    target = Target(**named)
    defaults = {"slow_model": target.model, "embedding_model": target.model, "extended_url": target.base_url}
    return Target(**{**defaults, "extended_key": target.api_key, **named})


@contextmanager
def serve_target(folder: Path) -> Iterator[Target]:
    """Start our own stack twice, once exactly as OpenAI's server is and once with the extensions, on one simulated
    engine: its answers are made up."""
    with ExitStack() as ending:
        served = ("--model", CHAT, README_MODEL, EMBEDDINGS, SLOW)
        engine = ending.enter_context(SimulatedProcess(*served, "--latency-of", SLOW, SLOW_SECONDS))
        strict = make_stack(folder / "strict", engine.url, **STRICT)
        extended = make_stack(folder / "extended", engine.url, **EXTENDED)
        ups = [(stack, stack.start()) for stack in (strict, extended)]
        for stack, up in ups:
            ending.callback(stop, stack, up)
        for stack, up in ups:
            wait_until_ready(stack, up)
        DagsterUi(strict.dagster_url).ask(POOL_LIMIT, limit=ENGINE_RUNS)
        yield Target(
            base_url=strict.api_url,
            api_key=make_key(strict),
            model=CHAT,
            embedding_model=EMBEDDINGS,
            slow_model=SLOW,
            extended_url=extended.api_url,
            extended_key=make_key(extended),
            later_url=start_api(strict, ending, "-c", LATER_API),
            limited_url=start_api(strict, ending, "-m", "api_shim", MAX_REQUESTS_PER_MINUTE="60"),
            max_file_bytes=STRICT["MAX_FILE_BYTES"],
        )


STRICT: Mapping[str, str] = {
    "COMPLETION_WINDOWS": "24h",
    "MAX_REQUESTS_PER_BATCH": "50000",
    "MAX_FILE_BYTES": str(200 << 20),
}
EXTENDED: Mapping[str, str] = {"VALIDATION_MODE": "lenient", "WEBHOOK_ALLOWED_HOSTS": "127.0.0.1"}


def make_stack(folder: Path, engine_url: str, **settings: str) -> Stack:
    folder.mkdir(parents=True)
    return Stack(folder, ENGINE_URL=engine_url, MAX_NUM_SEQS="8", **settings)


def wait_until_ready(stack: Stack, up: "subprocess.Popen[bytes]") -> None:
    # Twice as long as for one: there are two stacks.
    wait_for(lambda: "ready in" in stack.said() or up.poll() is not None, 2 * START_SECONDS)
    assert up.poll() is None, stack.said()


def stop(stack: Stack, up: "subprocess.Popen[bytes]") -> None:
    stack.run("down")
    up.wait()


def make_key(stack: Stack) -> str:
    made = stack.run("keys", "create", "--project", "conformance")
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def start_api(stack: Stack, ending: ExitStack, *arguments: str, **settings: str) -> str:
    """Start a second API on the state of `stack`. Returns its URL."""
    (port,) = ending.enter_context(hold_ports(1))
    api = subprocess.Popen(
        [sys.executable, *arguments],
        env={**stack.env, **settings, "API_PORT": str(port)},
        cwd=stack.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ending.callback(api.wait)
    ending.callback(api.terminate)
    wait_for(lambda: answers(f"http://127.0.0.1:{port}/health") or api.poll() is not None, START_SECONDS)
    assert api.poll() is None, f"the API on port {port} has ended with {api.returncode}"
    return f"http://127.0.0.1:{port}/v1"


def answers(url: str) -> bool:
    try:
        return httpx2.get(url).status_code == 200
    except httpx2.TransportError:
        return False
