"""The inference stage when nothing breaks: which bytes travel, the window, the borders of chunks, resume and rerun."""

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.conftest import CHAT, FAST, Rig, WatchedEngine, answer_of, id_range, ids, line_of, request_lines, until
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.adapters.simulated.answers import FINGERPRINT
from vllm_batch_dagster.core.lines import read_line
from vllm_batch_dagster.core.models import Attempt, ChunkSummary, Model, RequestCounts
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.stages import attempts
from vllm_batch_dagster.stages.inference import ChunkDone

ODD_BODIES = (
    b'{"model" : "tiny",  "messages":[{"role":"user","content":"caf\\u00e9 \xc3\xa9 \\ud83d\\ude00"}],"n":1e0}',
    b'{"temperature": 1e2, "top_p":1.50,"model":"tiny","seed":1,"messages":[], "seed":2 }',
    b'{"model":"tiny","messages":[{"role":"user","content":"a\\/b\\t\\""}],"big":123456789012345678901234567890}',
)
ODD_ANSWERS = (
    b'{ "choices" : [{"finish_reason":"stop", "text":"caf\\u00e9 \xc3\xa9"}],"a":1e2,"a":1.50, "b":-0.0}',
    b'{"usage":{"prompt_tokens":3 ,"completion_tokens":4},"choices":[],"x":"\\ud83d\\ude00\\/"}',
    b'{"object":"list","data":[],"unknown":1e999,"half":"\\u0000"}',
)


class Backwards(EchoEngine):
    """Answers lines in pairs, of each the second one first. The last line is `last`."""

    def __init__(self, last: int, **options: Any) -> None:
        super().__init__(**options)
        self._answered = [asyncio.Event() for _ in range(last + 1)]

    async def answer(self, model: Model, request: EngineRequest) -> EngineAnswer:
        line = line_of(request)
        if line % 2 == 0 and line + 1 < len(self._answered):
            await self._answered[line + 1].wait()
            await asyncio.sleep(0.01)  # so that whoever waits for the other one has it
        answer = await super().answer(model, request)
        self._answered[line].set()
        return answer


async def test_every_line_comes_out_once_and_in_order(rig: Rig) -> None:
    batch_id = rig.start(17, chunk_size=5)
    done: list[ChunkDone] = []
    assert await rig.infer(batch_id, Backwards(16, window=9), done=done) is None
    assert sorted(chunk.index for chunk in done) == [0, 1, 2, 3]
    written = [record.line for chunk in range(4) for record in rig.journal(batch_id, chunk, 1)]
    assert written != sorted(written)  # the engine really answered out of order
    rig.merge(batch_id)
    assert rig.batch(batch_id).status is BatchStatus.COMPLETED
    assert ids(rig.output(batch_id)) == id_range(17)
    assert rig.errors(batch_id) == []
    assert rig.batch(batch_id).counts == RequestCounts(17, 17, 0)


async def test_lines_go_on_while_a_chunk_is_published(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than the window holds: their answers become durable beside it."""
    batch_id = rig.start(30, chunk_size=10)
    engine = WatchedEngine(window=4)
    publish, went_on = attempts.ChunkAttempt.publish, list[bool]()

    def publish_slowly(attempt: attempts.ChunkAttempt, reason: str = "") -> ChunkSummary:
        if attempt.index == 0:
            went_on.append(all_sent.wait(55))
        return publish(attempt, reason)

    all_sent = threading.Event()
    watch = asyncio.create_task(until(lambda: len(engine.requests) == 30))
    watch.add_done_callback(lambda _task: all_sent.set())
    monkeypatch.setattr(attempts.ChunkAttempt, "publish", publish_slowly)
    done: list[ChunkDone] = []
    assert await rig.infer(batch_id, engine, done=done) is None
    await watch
    assert went_on == [True]
    assert [chunk.index for chunk in done] == [0, 1, 2]


async def test_bodies_and_answers_are_not_remade(rig: Rig) -> None:
    lines = b"".join(
        b'{"custom_id":"id-%d", "method": "POST","url":"%b","body": %b }\r\n' % (number, CHAT.encode(), body)
        for number, body in enumerate(ODD_BODIES)
    )
    batch_id = rig.start(lines)
    engine = WatchedEngine(lambda request: answer_of(ODD_ANSWERS[line_of(request)]))
    await rig.infer(batch_id, engine)
    assert {line_of(request): request.body for request in engine.requests} == dict(enumerate(ODD_BODIES))
    assert {request.endpoint for request in engine.requests} == {CHAT}
    rig.merge(batch_id)
    merged = rig.stored_lines(rig.batch(batch_id).output_file_id)
    assert len(merged) == len(ODD_ANSWERS)
    for line, answer in zip(merged, ODD_ANSWERS, strict=True):
        assert b'"body":' + answer + b'},"error":null}\n' in line


async def test_the_summary_says_what_was_sent(rig: Rig) -> None:
    batch_id = rig.start(5)
    done: list[ChunkDone] = []
    await rig.infer(batch_id, EchoEngine(), done=done)
    (chunk,) = done
    summary = chunk.summary
    assert (chunk.epoch, summary.counts, summary.sent, summary.replayed) == (1, RequestCounts(5, 5, 0), 5, 0)
    assert summary.usage.input_tokens == 10  # "question id-n" has two words
    assert summary.usage.output_tokens > 0
    assert sum(summary.finish_reasons.values()) == 5
    assert sum(count for _bound, count in summary.output_lengths) == 5
    assert summary.first_sent_at == summary.last_answer_at == rig.clock()
    assert rig.store.chunks.get(batch_id, 0).summary == summary


async def test_the_window_spans_the_border_of_chunks(rig: Rig) -> None:
    batch_id = rig.start(20, chunk_size=5)
    engine = WatchedEngine(holds=lambda _line: True, window=8)
    run = asyncio.create_task(rig.infer(batch_id, engine))
    await until(lambda: len(engine.in_flight) == 8)
    assert engine.in_flight == set(range(8))  # all of chunk 0 and three of chunk 1
    assert [request.priority for request in engine.requests] == [0] * 5 + [1] * 3
    engine.release()
    await run
    assert engine.most_in_flight == 8
    assert sorted(engine.asked) == list(range(20))


@pytest.mark.parametrize("window", [1, 3, 50])
async def test_no_more_requests_in_flight_than_the_window(rig: Rig, window: int) -> None:
    batch_id = rig.start(20, chunk_size=5)
    engine = WatchedEngine(holds=lambda _line: True, window=window)
    run = asyncio.create_task(rig.infer(batch_id, engine))
    await until(lambda: len(engine.in_flight) == min(window, 20))
    engine.release()
    await run
    assert engine.most_in_flight == min(window, 20)


async def test_answers_are_taken_while_the_next_chunk_is_begun(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store may take its time: a fast engine must not drain because nobody listens."""
    batch_id = rig.start(10, chunk_size=5)
    engine = WatchedEngine(window=6, holds=lambda line: line == 0)
    begin, may_begin = rig.store.chunks.begin, threading.Event()

    def begin_slowly(batch: str, index: int, **options: Any) -> Attempt:
        if index == 1:
            assert may_begin.wait(50)
        return begin(batch, index, **options)

    monkeypatch.setattr(rig.store.chunks, "begin", begin_slowly)
    run = asyncio.create_task(rig.infer(batch_id, engine))
    await until(lambda: rig.batch(batch_id).counts.completed == 4)
    assert engine.in_flight == {0}
    may_begin.set()
    engine.release()
    await run
    assert sorted(engine.asked) == list(range(10))


async def test_a_chunk_is_published_while_the_next_one_runs(rig: Rig) -> None:
    batch_id = rig.start(10, chunk_size=5)
    engine, done = WatchedEngine(holds=lambda line: line >= 5, window=10), list[ChunkDone]()
    run = asyncio.create_task(rig.infer(batch_id, engine, done=done))
    await until(lambda: done and engine.in_flight == {5, 6, 7, 8, 9})
    assert [chunk.index for chunk in done] == [0]
    assert [record.line for record in rig.journal(batch_id, 0, 1)] == [0, 1, 2, 3, 4]
    assert [chunk.is_published for chunk in rig.store.chunks.list(batch_id)] == [True, False]
    engine.release()
    await run
    assert [chunk.index for chunk in done] == [0, 1]


async def test_counts_and_usage_are_mirrored_while_it_runs(rig: Rig) -> None:
    batch_id = rig.start(10, chunk_size=10)

    def refuse_the_third(request: EngineRequest) -> EngineAnswer | None:
        return answer_of(b'{"error":{"message":"no"}}', 400) if line_of(request) == 2 else None

    engine = WatchedEngine(refuse_the_third, holds=lambda line: line >= 4)
    run = asyncio.create_task(rig.infer(batch_id, engine))
    await until(lambda: rig.batch(batch_id).counts == RequestCounts(10, 3, 1))
    usage = rig.batch(batch_id).usage
    assert usage is not None
    assert usage.input_tokens == 6
    assert not rig.store.chunks.get(batch_id, 0).is_published
    engine.release()
    await run
    assert rig.batch(batch_id).counts == RequestCounts(10, 9, 1)


async def test_many_answers_are_committed_before_the_time_is_up(rig: Rig) -> None:
    batch_id = rig.start(10, chunk_size=10)
    engine = WatchedEngine(holds=lambda line: line >= 4)
    slow = replace(FAST, commit_seconds=3600, commit_records=4, poll_seconds=3600)
    run = asyncio.create_task(rig.infer(batch_id, engine, policy=slow))
    await until(lambda: len(rig.journal(batch_id, 0, 1)) == 4)
    engine.release()
    await run
    assert rig.store.chunks.get(batch_id, 0).is_published


async def test_a_fresh_run_asks_everything_again(rig: Rig) -> None:
    batch_id = rig.start(10, chunk_size=5)
    await rig.infer(batch_id, EchoEngine())
    rig.merge(batch_id)
    first = rig.batch(batch_id)
    engine = WatchedEngine(lambda _request: answer_of(b'{"again":true}'))
    await rig.infer(batch_id, engine, only={1}, fresh={1})
    assert sorted(engine.asked) == [5, 6, 7, 8, 9]
    assert rig.batch(batch_id).is_stale
    rig.merge(batch_id)
    second = rig.batch(batch_id)
    assert (second.status, second.is_stale) == (BatchStatus.COMPLETED, False)
    assert second.output_file_id != first.output_file_id
    bodies = [row["response"]["body"] for row in rig.output(batch_id)]
    assert [body.get("system_fingerprint") for body in bodies[:5]] == [FINGERPRINT] * 5
    assert bodies[5:] == [{"again": True}] * 5
    assert ids(rig.output(batch_id)) == id_range(10)


async def test_a_second_run_over_a_chunk_with_all_answers_sends_nothing(rig: Rig) -> None:
    batch_id = rig.start(5)
    await rig.infer(batch_id, EchoEngine())
    engine, done = WatchedEngine(), list[ChunkDone]()
    await rig.infer(batch_id, engine, only={0}, done=done)
    assert engine.asked == []
    assert [(chunk.epoch, chunk.summary.replayed, chunk.summary.sent) for chunk in done] == [(2, 5, 0)]
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) == id_range(5)


async def test_no_chunks_need_no_engine(rig: Rig) -> None:
    batch_id = rig.start(5)
    engine = EchoEngine()
    assert await rig.infer(batch_id, engine, only=()) is None
    assert engine.leases == 0


async def test_a_file_without_a_last_newline_and_with_blank_lines(rig: Rig) -> None:
    batch_id = rig.start(b"\r\n\n" + request_lines(7).replace(b"\n", b"\r\n\r\n").rstrip(), chunk_size=3)
    await rig.infer(batch_id, EchoEngine())
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) == id_range(7)


async def test_a_line_is_read_when_it_is_sent_and_not_before(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = rig.start(50, chunk_size=50)
    read: list[bytes] = []
    monkeypatch.setattr(attempts, "read_line", lambda raw: read.append(raw) or read_line(raw))
    engine = WatchedEngine(holds=lambda _line: True, window=4)
    run = asyncio.create_task(rig.infer(batch_id, engine))
    await until(lambda: len(engine.in_flight) == 4)
    assert len(read) == 4
    engine.release()
    await run
    assert len(read) == 50
