"""One real Label Studio for all tests of this folder, and a project of its own for each of them."""

import itertools
from collections.abc import Iterator

import pytest

from scripts.label_studio import LabelStudio, LabelStudioFailed, running_label_studio
from vllm_batch_dagster.adapters.label_studio import LabelStudioBoard, LabelStudioSession, open_board

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/label_studio/" in item.path.as_posix():
            item.add_marker(pytest.mark.label_studio)
            # The first of them starts the server.
            item.add_marker(pytest.mark.timeout(400))


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudio]:
    try:
        with running_label_studio(tmp_path_factory.mktemp("label-studio")) as running:
            yield running
    except LabelStudioFailed as failure:
        pytest.fail(str(failure))


@pytest.fixture(scope="session")
def personal_token(label_studio: LabelStudio) -> str:
    with LabelStudioSession(label_studio.url, label_studio.token) as session:
        return str(session.post("/api/token/", {})["token"])


@pytest.fixture
def session(label_studio: LabelStudio) -> Iterator[LabelStudioSession]:
    with LabelStudioSession(label_studio.url, label_studio.token) as session:
        yield session


@pytest.fixture
def title() -> str:
    return f"test {next(_numbers)}"


@pytest.fixture
def board(session: LabelStudioSession, title: str) -> LabelStudioBoard:
    """A new project with our interface."""
    return open_board(session, 0, title)
