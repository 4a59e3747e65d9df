"""A whole stack on the real engine, shared by the tests of one module: starting the engine takes half a minute."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.dagster_ui import DagsterUi
from tests.stack import Stack, free_ports
from vllm_batch_dagster.settings import Settings

CHAT, EMBEDDINGS = "smollm2-135m-instruct", "all-minilm-l6-v2"


@pytest.fixture(scope="session")
def engine_settings() -> dict[str, str]:
    """Settings for the environment and models of `make setup`. Fails where they are missing: nothing is skipped."""
    settings = Settings()
    for path in (Path(settings.engine_python), settings.catalogue_path):
        if not path.exists():
            pytest.fail(f"{path} is missing: run `make setup` (ENGINE=none leaves these tests without an engine)")
    return {
        "ENGINE_URL": "",
        "ENGINE_PYTHON": settings.engine_python,
        "MODELS_FILE": str(settings.catalogue_path),
        "ENGINE_PORT": str(free_ports(1)[0]),
        # Less than the lines of a chunk, so that a death in the middle finds lines that were never sent.
        "MAX_NUM_SEQS": "16",
        "CHUNK_SIZE": "100",
        "CHUNK_SLOTS": "6",
    }


@pytest.fixture(scope="module")
def real_stack(tmp_path_factory: pytest.TempPathFactory, engine_settings: dict[str, str]) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"), **engine_settings)
    try:
        stack.start_and_wait()
        yield stack
    finally:
        stack.run("down")


@pytest.fixture(scope="module")
def client(real_stack: Stack) -> Iterator[openai.OpenAI]:
    """The official client, which here refuses any answer that differs from its types."""
    with openai.OpenAI(base_url=real_stack.api_url, api_key="any", _strict_response_validation=True) as client:
        yield client


@pytest.fixture(scope="module")
def ui(real_stack: Stack) -> DagsterUi:
    return DagsterUi(real_stack.dagster_url)
