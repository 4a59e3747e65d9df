"""A graph of its own for each test; nothing of it outlives the test."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests.defs.graph import Graph


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def graph(tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> Graph:
    """Three lines a chunk, four chunk slots."""
    monkeypatch.delenv("DELIVERY_FOLDER", raising=False)
    return Graph(tmp_path, instance)
