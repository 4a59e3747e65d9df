"""The `deliveries` asset: what came of each handler, and that none of them can harm a batch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from handlers.base import ResultHandler, Results
from handlers.registry import BrokenHandler
from tests.defs.graph import Graph, line_of, materialized, refuse, values
from vllm_batch_dagster.core.states import BatchStatus


class Handler(ResultHandler):
    """Notes what it is given, and answers or raises `outcome`."""

    def __init__(self, name: str, outcome: bool | Exception = True, *, enabled: bool = True) -> None:
        self._name, self._outcome, self._enabled = name, outcome, enabled
        self.given: list[tuple[str, list[str], Mapping[str, str]]] = []

    def name(self) -> str:
        return self._name

    def enabled(self) -> bool:
        return self._enabled

    def handle(self, batch_id: str, results: Results, metadata: Mapping[str, str]) -> bool:
        self.given.append((batch_id, [row["custom_id"] for row in results], metadata))
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def install(monkeypatch: pytest.MonkeyPatch, handlers: Sequence[ResultHandler | BrokenHandler]) -> None:
    monkeypatch.setattr("vllm_batch_dagster.defs.deliveries.load_handlers", lambda: iter(handlers))


def test_a_handler_gets_output_then_error_lines_and_the_metadata(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    good, off = Handler("good"), Handler("off", enabled=False)
    install(monkeypatch, [good, off])
    graph.engine.reply = lambda request: refuse(request) if line_of(request) == 1 else None
    batch_id = graph.inferred(3, metadata={"team": "search"})
    assert graph.run("finalize_batch", batch_id).success
    assert good.given == [(batch_id, ["line-0", "line-2", "line-1"], {"team": "search"})]
    assert off.given == []
    metadata = values(graph.shown("deliveries", batch_id)[0].metadata)
    assert metadata["delivered"] == 1
    assert metadata["handlers"] == {"good": "delivered", "off": "off"}


@pytest.mark.parametrize("outcome", [False, RuntimeError("the service is away")])
def test_a_failing_handler_fails_the_asset_and_not_the_batch(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, outcome: bool | Exception
) -> None:
    """The others are still served, the data set is still written, and the sensor leaves the batch alone."""
    bad, good = Handler("bad", outcome), Handler("good")
    install(monkeypatch, [bad, good])
    batch_id = graph.inferred(3)
    result = graph.run("finalize_batch", batch_id)
    assert not result.success
    assert {asset for asset, _ in materialized(result)} == {"merged_output", "curated_export"}
    assert graph.shown("deliveries", batch_id) == []
    assert len(good.given) == 1
    failure = str(result.failure_data_for_node("deliveries"))
    assert "bad" in failure
    assert str(outcome) in failure
    assert graph.batch(batch_id).status is BatchStatus.COMPLETED
    assert graph.batch(batch_id).output_file_id is not None
    assert not graph.tick().run_requests


def test_a_broken_handler_is_shown_and_harms_nobody(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Handler("good")
    install(monkeypatch, [BrokenHandler("missing", "no such module"), good])
    batch_id = graph.inferred(3)
    assert graph.run("finalize_batch", batch_id).success
    metadata = values(graph.shown("deliveries", batch_id)[0].metadata)
    assert metadata["handlers"] == {"missing": "broken: no such module", "good": "delivered"}


def test_the_directory_handler_delivers_what_the_output_file_holds(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DELIVERY_FOLDER", str(tmp_path / "out"))
    batch_id = graph.inferred(3)
    assert graph.run("finalize_batch", batch_id).success
    delivered = (tmp_path / "out" / f"{batch_id}.jsonl").read_bytes()
    with graph.services.files.open(graph.batch(batch_id).output_file_id or "") as output:
        assert delivered == output.read()
    assert [json.loads(line)["custom_id"] for line in delivered.splitlines()] == ["line-0", "line-1", "line-2"]
