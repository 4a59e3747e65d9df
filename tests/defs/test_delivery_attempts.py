"""When deliveries are attempted: at the end, again when they are due, by hand, for new results; and webhooks beside."""

import json
from collections.abc import Iterator

import dagster as dg
import pytest

from tests.conformance.receiver import Receiver
from tests.defs.delivering import DEAD, DELIVERED, PENDING, Handler, asked, by_hand, install, kept, states
from tests.defs.graph import Graph, chat_line, checks
from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.core.states import BatchStatus

HOUR = 3600


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def clock(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> FixedClock:
    """The time of the services, moved by the test."""
    clock = FixedClock(graph.services.clock())
    monkeypatch.setattr(graph.services, "clock", clock)
    return clock


@pytest.fixture
def listening(graph: Graph) -> Graph:
    """A graph whose webhooks may go to this machine."""
    settings = graph.services.settings.model_copy(update={"webhook_allowed_hosts": "127.0.0.1"})
    graph.services.settings = settings
    return graph


def test_what_failed_is_asked_for_again_when_its_time_has_come(
    graph: Graph, clock: FixedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = Handler("bad", False), Handler("good")
    install(monkeypatch, [bad, good])
    batch_id = graph.merged(3)
    due_at = kept(graph, batch_id)["handler:bad"].next_attempt_at
    clock.now = due_at - 1
    assert asked(graph, batch_id) == []
    clock.now = due_at
    (request,) = asked(graph, batch_id)
    assert (request.job_name, request.partition_key) == ("deliver_batch", batch_id)
    bad.outcome = True
    assert graph.launch(request).success
    assert (len(bad.given), len(good.given)) == (2, 1)
    assert states(graph, batch_id) == {"handler:bad": DELIVERED, "handler:good": DELIVERED}
    assert asked(graph, batch_id) == []


@pytest.mark.parametrize(
    ("job", "is_asked"), [("infer_chunks", True), ("finalize_batch", False), ("deliver_batch", False)]
)
def test_only_a_run_that_delivers_itself_is_waited_for(
    graph: Graph, clock: FixedClock, monkeypatch: pytest.MonkeyPatch, job: str, is_asked: bool
) -> None:
    """A chunk that a person runs again may stand in the queue for hours."""
    install(monkeypatch, [Handler("bad", False)])
    batch_id = graph.merged(3)
    clock.now = kept(graph, batch_id)["handler:bad"].next_attempt_at
    graph.create_run(job, status=dg.DagsterRunStatus.QUEUED, tags={"batch": batch_id})
    assert bool(asked(graph, batch_id)) is is_asked


def test_the_keys_of_two_rounds_differ(graph: Graph, clock: FixedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster would drop the second one."""
    install(monkeypatch, [Handler("bad", False)])
    batch_id = graph.merged(3)
    keys = []
    for _ in range(2):
        clock.now = kept(graph, batch_id)["handler:bad"].next_attempt_at
        (before,) = asked(graph, batch_id)
        (request,) = asked(graph, batch_id)
        assert request.run_key == before.run_key
        keys.append(request.run_key)
        assert graph.launch(request).success
    assert len(set(keys)) == 2


def test_it_is_dead_after_72_hours_and_alive_again_by_hand(
    graph: Graph, clock: FixedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Handler("bad", False)
    install(monkeypatch, [bad])
    batch_id = graph.merged(3)
    clock.now += 73 * HOUR
    (request,) = asked(graph, batch_id)
    result = graph.launch(request)
    assert result.success
    assert states(graph, batch_id) == {"handler:bad": DEAD}
    assert not checks(result)["handlers_delivered", batch_id]
    clock.now += HOUR
    assert asked(graph, batch_id) == []
    bad.outcome = True
    assert by_hand(graph, batch_id).success
    assert states(graph, batch_id) == {"handler:bad": DELIVERED}


def test_by_hand_what_is_not_delivered_or_all_or_some(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = Handler("bad", False), Handler("good")
    install(monkeypatch, [bad, good])
    batch_id = graph.merged(3)
    assert by_hand(graph, batch_id).success
    assert (len(bad.given), len(good.given)) == (2, 1)
    assert by_hand(graph, batch_id, again=True, targets=["handler:good"]).success
    assert (len(bad.given), len(good.given)) == (2, 2)
    assert by_hand(graph, batch_id, again=True).success
    assert (len(bad.given), len(good.given)) == (3, 3)


def test_new_results_are_a_new_delivery(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was still to be given of the old ones is given up."""
    bad, good = Handler("bad", False), Handler("good")
    install(monkeypatch, [bad, good])
    batch_id = graph.merged(3)
    assert graph.run_chunks(batch_id, 0, 0).success
    assert all(graph.launch(request).success for request in asked(graph, batch_id))
    found = graph.services.store.deliveries.of_batch(batch_id)
    assert [(each.target, each.state, each.version) for each in found] == [
        ("handler:bad", DEAD, 1),
        ("handler:good", DELIVERED, 1),
        ("handler:bad", PENDING, 2),
        ("handler:good", DELIVERED, 2),
    ]
    assert len({each.id for each in found}) == 4
    assert (len(bad.given), len(good.given)) == (2, 2)


def test_the_run_that_retries_takes_over_what_its_dead_forerunner_held(
    graph: Graph, clock: FixedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time would not be over for half an hour."""
    good = Handler("good")
    install(monkeypatch, [good])
    batch_id = graph.inferred(3)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vllm_batch_dagster.stages.deliveries._Trip.attempt", die)
        dead = graph.run("finalize_batch", batch_id)
    assert not dead.success
    assert kept(graph, batch_id)["handler:good"].claimed_by == dead.run_id
    clock.now += 60
    assert asked(graph, batch_id) == []
    parent = graph.instance.get_run_by_id(dead.run_id)
    tags = {"batch": batch_id, "dagster/retry_number": "1"}
    assert graph.run("deliver_batch", batch_id, parent=parent, tags=tags).success
    assert states(graph, batch_id) == {"handler:good": DELIVERED}


def test_a_batch_without_anybody_to_tell_needs_no_run(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [Handler("good")])
    batch_id = graph.admit([chat_line(0, url="/v1/else")])
    assert graph.run("validate_batch", batch_id).success
    assert graph.batch(batch_id).status is BatchStatus.FAILED
    assert asked(graph, batch_id) == []
    assert graph.services.store.events(batch_id)[0].is_planned
    assert kept(graph, batch_id) == {}


def test_a_failed_batch_tells_its_webhook_and_no_handler(
    listening: Graph, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Handler("good")
    install(monkeypatch, [good])
    batch_id = listening.admit([chat_line(0, url="/v1/else")], metadata={"webhook_url": f"{receiver.url}/ok"})
    assert listening.run("validate_batch", batch_id).success
    (request,) = asked(listening, batch_id)
    result = listening.launch(request)
    assert result.success
    assert checks(result)["webhooks_delivered", batch_id]
    (delivery,) = receiver.got("ok")
    assert json.loads(delivery.body)["type"] == "batch.failed"
    assert json.loads(delivery.body)["data"] == {"id": batch_id}
    assert good.given == []
    assert asked(listening, batch_id) == []


def test_a_webhook_is_tried_again_and_told_once_however_often_the_batch_is_merged(
    listening: Graph, clock: FixedClock, receiver: Receiver
) -> None:
    batch_id = listening.merged(3, metadata={"webhook_url": f"{receiver.url}/error"})
    clock.now = kept(listening, batch_id)["webhook:metadata"].next_attempt_at
    assert all(listening.launch(request).success for request in asked(listening, batch_id))
    assert states(listening, batch_id) == {"webhook:metadata": DELIVERED}
    first, second = receiver.got("error")
    assert first.id == second.id
    assert listening.run_chunks(batch_id, 0, 0).success
    assert all(listening.launch(request).success for request in asked(listening, batch_id))
    assert listening.services.store.events(batch_id)[0].is_planned
    assert len(receiver.got("error")) == 2


def test_a_webhook_that_is_away_keeps_no_handler_waiting(
    listening: Graph, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Handler("good")
    install(monkeypatch, [good])
    batch_id = listening.merged(3, metadata={"webhook_url": "http://127.0.0.1:9/"})
    assert states(listening, batch_id) == {"webhook:metadata": PENDING, "handler:good": DELIVERED}
