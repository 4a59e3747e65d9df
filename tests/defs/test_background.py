"""The inference beside the asset's thread: order, errors, and interrupts, which leave no thread and lose no answer."""

import threading
from collections.abc import Callable

import pytest

from tests.defs.graph import Graph, every_id, line_of, said
from vllm_batch_dagster.core.models import StopReason
from vllm_batch_dagster.core.ports import EngineRequest, Report
from vllm_batch_dagster.defs.background import BackgroundInference
from vllm_batch_dagster.stages.inference import ChunkDone, RangeInference
from vllm_batch_dagster.stages.intake import cancel_batch

THREAD = "inference"


class Interrupted(BaseException):
    """What a cancellation by Dagster is: no Exception."""


def background(graph: Graph, batch_id: str, report: Report = lambda _: None) -> BackgroundInference:
    """Return an inference of every chunk of a validated batch."""
    services, batch = graph.services, graph.batch(batch_id)

    def make(on_done: Callable[[ChunkDone], None], report: Report) -> RangeInference:
        return RangeInference(
            services.inference_ports,
            services.inference_policy,
            batch,
            services.model_of(batch),
            services.store.chunks.list(batch_id),
            fresh=frozenset(),
            run_id="run",
            on_done=on_done,
            report=report,
        )

    return BackgroundInference(make, report)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == THREAD]


def test_chunks_come_as_they_finish_and_then_it_ends(graph: Graph) -> None:
    batch_id = graph.validated()
    sentences: list[str] = []
    with background(graph, batch_id, sentences.append) as running:
        done = [chunk.index for chunk in running.finished_chunks()]
    assert sorted(done) == [0, 1, 2]
    assert running.stopped is None
    assert any("chunk 0001" in sentence for sentence in sentences)
    assert threads() == []


def test_the_report_is_called_on_the_thread_of_the_asset(graph: Graph) -> None:
    """It writes to Dagster's log, which belongs to that thread."""
    seen: set[str] = set()
    with background(graph, graph.validated(), lambda _: seen.add(threading.current_thread().name)) as running:
        list(running.finished_chunks())
    assert seen == {threading.current_thread().name}


def test_requests_go_on_while_the_asset_is_busy(graph: Graph) -> None:
    """The asset writes events of the first chunk; the later chunks are asked meanwhile."""
    batch_id = graph.validated()
    all_asked = threading.Event()

    def reply(request: EngineRequest) -> None:
        if line_of(request) == 7:
            all_asked.set()

    graph.engine.reply = reply
    with background(graph, batch_id) as running:
        chunks = running.finished_chunks()
        next(chunks)
        assert all_asked.wait(30), "the engine waits for the asset"
        list(chunks)


def test_an_error_is_raised_in_the_thread_of_the_asset(graph: Graph) -> None:
    batch_id = graph.validated()

    def reply(request: EngineRequest) -> Exception | None:
        return LookupError("a bug") if line_of(request) == 4 else None

    graph.engine.reply = reply
    with pytest.raises(LookupError, match="a bug"), background(graph, batch_id) as running:
        list(running.finished_chunks())
    assert threads() == []


def test_an_error_while_it_is_made_is_raised_too() -> None:
    def make(*_: object) -> RangeInference:
        raise LookupError("no such model")

    with pytest.raises(LookupError, match="no such model"), BackgroundInference(make, lambda _: None) as running:
        list(running.finished_chunks())
    assert threads() == []


def test_an_interrupt_ends_the_loop_and_keeps_what_was_answered(graph: Graph) -> None:
    batch_id = graph.validated(12)
    graph.engine.reply = hang_from(6, graph)
    with pytest.raises(Interrupted), background(graph, batch_id) as running:
        interrupt_after_one(running)
    assert threads() == []
    assert graph.services.store.chunks.get(batch_id, 0).is_published
    asked = graph.engine.lines()
    assert max(asked) < 11, "it did not go on to the end"

    graph.use_engine()
    graph.engine.reply = lambda request: said(request, "later")
    assert graph.run_chunks(batch_id, 0, 3).success
    assert not {0, 1, 2} & set(graph.engine.lines()), "the published chunk is not asked again"
    assert graph.run("finalize_batch", batch_id).success
    assert graph.custom_ids(graph.batch(batch_id).output_file_id) == every_id(12)


def interrupt_after_one(running: BackgroundInference) -> None:
    next(running.finished_chunks())
    raise Interrupted


def hang_from(line: int, graph: Graph) -> Callable[[EngineRequest], None]:
    """Make the engine slow once it is asked for `line`."""

    def reply(request: EngineRequest) -> None:
        if line_of(request) == line:
            graph.services.engines._latency = 3600.0  # type: ignore[attr-defined]

    return reply


def test_an_interrupt_before_the_first_chunk(graph: Graph) -> None:
    graph.use_engine(latency=3600.0)
    batch_id = graph.validated()
    with pytest.raises(Interrupted), background(graph, batch_id):
        raise Interrupted
    assert threads() == []
    assert not any(chunk.is_published for chunk in graph.services.store.chunks.list(batch_id))


def test_an_interrupt_while_it_starts(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    graph.use_engine(latency=3600.0)
    running = background(graph, graph.validated())
    waits = iter([Interrupted])
    really_wait = running._started.wait

    def wait() -> bool:
        for interrupt in waits:
            raise interrupt
        return really_wait()

    monkeypatch.setattr(running._started, "wait", wait)
    with pytest.raises(Interrupted), running:
        pass
    assert threads() == []


def test_a_cancelled_batch_ends_it_without_an_error(graph: Graph) -> None:
    graph.use_engine(latency=0.2)
    batch_id = graph.validated(60)
    with background(graph, batch_id) as running:
        cancel_batch(batch_id, graph.services.store, graph.services.clock)
        list(running.finished_chunks())
    assert running.stopped is StopReason.CANCELLED
    assert len(graph.engine.lines()) < 60
