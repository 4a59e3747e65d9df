"""The `deliveries` asset: what came of each handler, how it is shown, and that none of them can harm a batch."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import dagster as dg
import pytest

from handlers.base import Results
from handlers.registry import BrokenHandler
from tests.defs.delivering import DEAD, DELIVERED, PENDING, Handler, asked, install, kept, states
from tests.defs.graph import Graph, checks, line_of, materialized, refuse, rows, values
from vllm_batch_dagster.core.states import BatchStatus


def test_a_handler_gets_output_then_error_lines_and_the_metadata(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    good, off = Handler("good"), Handler("off", enabled=False)
    install(monkeypatch, [good, off])
    graph.engine.reply = lambda request: refuse(request) if line_of(request) == 1 else None
    batch_id = graph.inferred(3, metadata={"team": "search"})
    result = graph.run("finalize_batch", batch_id)
    assert result.success
    assert good.given == [(batch_id, ["line-0", "line-2", "line-1"], {"team": "search"})]
    assert off.given == []
    metadata = graph.shown("deliveries", batch_id)[0].metadata
    (row,) = rows(metadata["targets"])
    assert (row["target"], row["state"], row["attempts"]) == ("handler:good", "delivered", 1)
    shown = values(metadata)
    assert (shown["delivered"], shown["pending"], shown["dead"]) == (1, 0, 0)
    assert shown["unused_handlers"] == {"off": "off"}
    assert checks(result)["handlers_delivered", batch_id]
    assert asked(graph, batch_id) == []


@pytest.mark.parametrize("outcome", [False, RuntimeError("the service is away"), SystemExit(3)])
def test_a_failing_handler_fails_a_check_and_nothing_else(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, outcome: object
) -> None:
    """The others are still served, the data set is still written, and the batch is as it was."""
    bad, good = Handler("bad", outcome), Handler("good")
    install(monkeypatch, [bad, good])
    batch_id = graph.inferred(3)
    result = graph.run("finalize_batch", batch_id)
    assert result.success
    assert {asset for asset, _ in materialized(result)} == {"merged_output", "deliveries", "curated_export"}
    assert not checks(result)["handlers_delivered", batch_id]
    assert checks(result)["webhooks_delivered", batch_id]
    assert states(graph, batch_id) == {"handler:bad": PENDING, "handler:good": DELIVERED}
    assert len(good.given) == 1
    told = "did not return True" if outcome is False else str(outcome)
    assert told in (kept(graph, batch_id)["handler:bad"].last_error or "")
    assert graph.batch(batch_id).status is BatchStatus.COMPLETED


def test_each_attempt_is_in_the_history_of_the_partition(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [Handler("bad", False), Handler("good")])
    batch_id = graph.merged(3)
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey("deliveries"), asset_partitions=[batch_id])
    shown = [each.asset_observation for each in graph.instance.fetch_observations(wanted, limit=9).records]
    found = {str(each.metadata["target"].value): values(each.metadata) for each in shown if each is not None}
    assert (found["handler:good"]["state"], found["handler:bad"]["state"]) == ("delivered", "pending")
    assert "did not return True" in found["handler:bad"]["last_error"]


def test_a_broken_handler_is_shown_and_harms_nobody(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [BrokenHandler("missing", "no such module"), Handler("good")])
    batch_id = graph.merged(3)
    metadata = values(graph.shown("deliveries", batch_id)[0].metadata)
    assert metadata["unused_handlers"] == {"missing": "broken: no such module"}
    assert states(graph, batch_id) == {"handler:good": DELIVERED}


def test_a_handler_that_hangs_is_left_to_itself(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are served meanwhile, and the run ends."""
    released = threading.Event()

    class Hanging(Handler):
        def handle(self, batch_id: str, results: Results, metadata: Mapping[str, str]) -> bool:
            return released.wait(600)

    good = Handler("good")
    install(monkeypatch, [Hanging("hanging"), good])
    # Enough for the good one, on a machine that has little time for it.
    graph.services.settings = graph.services.settings.model_copy(update={"handler_timeout_seconds": 5})
    batch_id = graph.merged(3)
    released.set()
    assert states(graph, batch_id) == {"handler:hanging": PENDING, "handler:good": DELIVERED}
    assert "no end after 5 s" in (kept(graph, batch_id)["handler:hanging"].last_error or "")


@pytest.mark.parametrize(
    ("asked_for", "given"), [("good", ["good"]), ("good, other", ["good", "other"]), ("none", []), ("", [])]
)
def test_the_batch_chooses_its_handlers(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, asked_for: str, given: list[str]
) -> None:
    handlers = [Handler("good"), Handler("other"), Handler("third")]
    install(monkeypatch, handlers)
    graph.merged(3, metadata={"handlers": asked_for})
    assert [handler.name() for handler in handlers if handler.given] == given


def test_a_handler_that_does_not_exist_is_seen(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [Handler("good")])
    batch_id = graph.merged(3, metadata={"handlers": "godo"})
    delivery = kept(graph, batch_id)["handler:godo"]
    assert delivery.state is DEAD
    assert "installed: good" in (delivery.last_error or "")


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
