"""What Dagster does and shows while a pause holds: no run for the engine, all else, and again when it is over."""

from pathlib import Path

import dagster as dg
import pytest

from tests.defs.graph import Graph, line_of
from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.core.errors import EngineStartFailed, EngineUnavailable
from vllm_batch_dagster.core.pauses import ALL, Pause, PauseCause, model_scope
from vllm_batch_dagster.core.ports import EngineRequest
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.stages.intake import cancel_batch

MOVING = Pause(ALL, PauseCause.OPERATOR, "moving house", 1)
NIGHT = {"dispatch_hours": "22:00-06:00", "dispatch_time_zone": "UTC"}
NOON, EVENING = 1_700_049_600.0, 1_700_085_600.0  # 12:00 and 22:00 in UTC


def jobs(graph: Graph) -> list[str | None]:
    return [request.job_name for request in graph.tick().run_requests or ()]


def pause(graph: Graph, pause: Pause = MOVING) -> None:
    graph.services.store.pauses.put(pause)


def test_a_paused_batch_is_validated_and_waits_then_goes_on(graph: Graph) -> None:
    pause(graph)
    batch_id = graph.submit(8)
    assert jobs(graph) == ["validate_batch"]
    assert all(result.success for result in graph.step())
    tick = graph.tick()
    assert not tick.run_requests
    assert "all paused by operator: moving house" in str(tick.skip_reason)
    graph.services.store.pauses.remove(ALL, PauseCause.OPERATOR)
    assert jobs(graph) == ["infer_chunks"]
    assert graph.finish(batch_id).status is BatchStatus.COMPLETED


def test_a_pause_of_one_batch_leaves_the_others(graph: Graph) -> None:
    first, second = graph.validated(3), graph.validated(3)
    pause(graph, Pause(first, PauseCause.OPERATOR, "not now", 1))
    assert [request.tags["batch"] for request in graph.tick().run_requests or ()] == [second]


def test_what_needs_no_engine_goes_on(graph: Graph) -> None:
    batch_id = graph.inferred(3)
    pause(graph)
    assert jobs(graph) == ["finalize_batch"]
    assert all(result.success for result in graph.step())
    assert graph.batch(batch_id).status is BatchStatus.COMPLETED


def test_a_paused_batch_is_cancelled(graph: Graph) -> None:
    batch_id = graph.validated(3)
    pause(graph)
    cancel_batch(batch_id, graph.services.store, graph.services.clock)
    assert jobs(graph) == ["finalize_batch"]
    assert all(result.success for result in graph.step())
    assert graph.batch(batch_id).status is BatchStatus.CANCELLED


def test_a_paused_batch_expires(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = graph.validated(3)
    pause(graph)
    monkeypatch.setattr(graph.services, "clock", FixedClock(graph.batch(batch_id).expires_at))
    assert jobs(graph) == ["finalize_batch"]
    assert all(result.success for result in graph.step())
    assert graph.batch(batch_id).status is BatchStatus.EXPIRED


def test_a_run_that_meets_a_pause_ends_well_and_says_so(graph: Graph) -> None:
    batch_id = graph.validated(8)
    (request,) = graph.tick().run_requests or ()
    pause(graph)
    result = graph.launch(request)
    assert result.success
    assert graph.engine.lines() == []
    observed = [event for event in result.all_events if event.event_type is dg.DagsterEventType.ASSET_OBSERVATION]
    (observation,) = (event.asset_observation_data.asset_observation for event in observed)
    shown = {name: entry.value for name, entry in observation.metadata.items()}
    assert (shown["paused_by"], shown["pause_scope"], shown["pause_reason"]) == ("operator", "all", "moving house")
    assert observation.partition == f"{batch_id}|0000"
    assert jobs(graph) == []
    graph.services.store.pauses.remove(ALL, PauseCause.OPERATOR)
    assert graph.finish(batch_id).counts.completed == 8


def test_an_engine_that_does_not_come_back_pauses_the_model(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = graph.validated(8)

    def reply(request: EngineRequest) -> Exception | None:
        return EngineUnavailable("it died") if line_of(request) == 4 else None

    def restart() -> None:
        raise EngineStartFailed("out of memory")

    graph.engine.reply, graph.engine.on_restart = reply, restart
    assert all(result.success for result in graph.step())
    tick = graph.tick()
    assert not tick.run_requests
    assert "out of memory" in str(tick.skip_reason)
    (breaker,) = graph.services.store.pauses.list()
    assert breaker.scope == model_scope("tiny")
    assert breaker.until is not None
    graph.engine.mend()
    graph.engine.lines()
    monkeypatch.setattr(graph.services, "clock", FixedClock(breaker.until))
    graph.services.__dict__.pop("pauses", None)
    assert all(result.success for result in graph.step())
    assert graph.engine.lines() == [4, 5, 6, 7]
    assert list(graph.services.store.pauses.list()) == []
    assert graph.finish(batch_id).counts.completed == 8


def test_a_change_of_the_catalogue_tries_again(graph: Graph) -> None:
    batch_id = graph.validated(3)
    mark = graph.services.configuration_of("tiny")
    pause(graph, Pause(model_scope("tiny"), PauseCause.ENGINE, "no such model", 1, mark=mark))
    assert jobs(graph) == []
    graph.services.settings.catalogue_path.write_text("models:\n  - name: tiny\n    path: someone/smaller\n")
    assert jobs(graph) == ["infer_chunks"]
    assert list(graph.services.store.pauses.list()) == []
    assert graph.finish(batch_id).status is BatchStatus.COMPLETED


def test_outside_of_its_hours_nothing_is_sent(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Graph(tmp_path, instance, **NIGHT)
    batch_id = graph.validated(3)
    for seconds, wanted in ((NOON, []), (EVENING, ["infer_chunks"])):
        monkeypatch.setattr(graph.services, "clock", FixedClock(seconds))
        graph.services.__dict__.pop("pauses", None)
        tick = graph.tick()
        assert [request.job_name for request in tick.run_requests or ()] == wanted
    assert graph.batch(batch_id).status is BatchStatus.IN_PROGRESS
