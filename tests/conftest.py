"""What `tests/conformance` and `tests/clients` share: the server under test, and the batches that run on it."""

import signal
from collections.abc import Iterator

import httpx2
import openai
import pytest
from hypothesis import settings

from tests.clients.runs import Clients
from tests.conformance.submissions import Submissions, submit_all
from tests.target import Target, add_options, read_options, serve_target

# How long an example takes says nothing on a machine that others use too. Here, so that every folder has it, however
# its tests are chosen.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure() -> None:
    """Heed Ctrl-C even where a shell put us into the background (`make test &` in a script), which ignores it.

    Dagster, when it runs in this process, gives SIGTERM the action of SIGINT, and every child inherits an ignored one.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and where nohup makes it ignored


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """The server that --base-url names, else our own stack with made-up answers."""
    named = read_options(request.config)
    if named.base_url:
        yield named
        return
    with serve_target(tmp_path_factory.mktemp("target")) as target:
        yield target


@pytest.fixture(scope="session")
def strict_client(target: Target) -> Iterator[openai.OpenAI]:
    """The official client, which here refuses any answer that differs from its types."""
    with openai.OpenAI(
        base_url=target.base_url, api_key=target.api_key, _strict_response_validation=True
    ) as strict_client:
        yield strict_client


@pytest.fixture(scope="session")
def plain(target: Target) -> Iterator[httpx2.Client]:
    """Plain HTTP with the key. Paths are relative to /v1/, without a slash at the front."""
    headers = {"Authorization": f"Bearer {target.api_key}"}
    with httpx2.Client(base_url=target.base_url, headers=headers, timeout=60) as plain:
        yield plain


@pytest.fixture(scope="session")
def submissions(target: Target, strict_client: openai.OpenAI) -> Iterator[Submissions]:
    """Every batch of the checklist, created at once; a thread watches them."""
    with submit_all(target, strict_client) as submissions:
        yield submissions


@pytest.fixture(scope="session")
def clients(target: Target, submissions: Submissions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    """Every real client, at work beside the batches of the checklist."""
    clients = Clients(tmp_path_factory.mktemp("clients"), target)
    try:
        clients.start_all()
        yield clients
    finally:
        clients.stop()
