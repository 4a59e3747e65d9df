"""Repair rounds through whole runs: who is asked again, which answer is accepted, what is counted, and any death."""

import asyncio
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.conftest import FAST, Reply, Rig, WatchedEngine, answer_of, id_range, ids, line_of, request_line
from vllm_batch_dagster.core.errors import EngineFailure, EngineUnavailable
from vllm_batch_dagster.core.models import Model, RepairCounts, RequestCounts, Usage
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest
from vllm_batch_dagster.stages.partial import PartialResults

SCHEMA = {"type": "object", "required": ["a"]}
WANTED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
GOOD, BAD = '{"a":1}', '{"b":1}'


def body_of(number: int, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": f"question {number}"}], **fields}


def says(text: str, *, reason: str = "stop", spent: int = 4) -> EngineAnswer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return answer_of(
        json.dumps({"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": spent}}).encode()
    )


def start(rig: Rig, total: int, metadata: Mapping[str, str], **fields: Any) -> str:
    lines = b"".join(request_line(f"id-{number}", body=body_of(number, **fields)) for number in range(total))
    batch_id = rig.create(rig.upload(lines), metadata=metadata)
    rig.validate(batch_id, chunk_size=total)
    return batch_id


def script(*replies: Reply) -> Callable[[EngineRequest], Reply]:
    """Replies to line 1 in turn; every other line is answered well at once."""
    left = list(replies)
    return lambda request: (left.pop(0) if left else says("over")) if line_of(request) == 1 else says(GOOD)


def content(row: Mapping[str, Any]) -> str:
    return str(row["response"]["body"]["choices"][0]["message"]["content"])


async def run(rig: Rig, batch_id: str, engine: WatchedEngine) -> list[dict[str, Any]]:
    await rig.infer(batch_id, engine)
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) + ids(rig.errors(batch_id)) == id_range(3)
    return rig.output(batch_id)


def bodies(engine: WatchedEngine, line: int = 1) -> list[dict[str, Any]]:
    return [msgspec.json.decode(request.body) for request in engine.requests if line_of(request) == line]


async def test_only_the_lines_that_break_their_schema_are_asked_again(rig: Rig) -> None:
    batch_id = start(rig, 3, {"repair_schema": "2"}, response_format=WANTED)
    engine = WatchedEngine(script(says(BAD), says("no json"), says(GOOD)))
    output = await run(rig, batch_id, engine)
    assert Counter(engine.asked) == {0: 1, 1: 3, 2: 1}
    assert [content(row) for row in output] == [GOOD] * 3
    assert [sent.get("seed") for sent in bodies(engine)] == [None, 1, 2]
    batch = rig.batch(batch_id)
    assert batch.counts == RequestCounts(3, 3, 0)
    assert batch.repairs == RepairCounts(repaired=1, unrepaired=0, repeats=2, repeat_tokens=28)
    assert batch.usage == Usage(input_tokens=50, output_tokens=20)
    kept = [(record.round, record.repair) for record in rig.journal(batch_id, 0, 1) if record.line == 1]
    assert kept == [(0, "schema"), (1, "schema"), (2, "repaired")]


async def test_the_last_answer_stands_when_no_round_helps(rig: Rig) -> None:
    batch_id = start(rig, 3, {"repair_schema": "1"}, response_format=WANTED)
    engine = WatchedEngine(script(says(BAD), says('{"c":1}')))
    output = await run(rig, batch_id, engine)
    assert [content(row) for row in output] == [GOOD, '{"c":1}', GOOD]
    assert rig.batch(batch_id).repairs == RepairCounts(0, 1, 1, 14)


async def test_a_repeat_that_would_be_the_same_is_not_asked_for(rig: Rig) -> None:
    batch_id = start(rig, 3, {"repair_schema": "3"}, response_format=WANTED, temperature=0)
    engine = WatchedEngine(script(says(BAD)))
    output = await run(rig, batch_id, engine)
    assert (content(output[1]), len(engine.asked)) == (BAD, 3)
    assert rig.batch(batch_id).repairs == RepairCounts(0, 1, 0, 0)


async def test_a_repair_that_fails_leaves_the_success(rig: Rig) -> None:
    batch_id = start(rig, 3, {"repair_schema": "2"}, response_format=WANTED)
    engine = WatchedEngine(script(says(BAD), answer_of(b'{"error":{"message":"no"}}', 400)))
    output = await run(rig, batch_id, engine)
    assert content(output[1]) == BAD
    batch = rig.batch(batch_id)
    assert (batch.counts, batch.repairs) == (RequestCounts(3, 3, 0), RepairCounts(0, 1, 2, 0))
    assert batch.usage == Usage(input_tokens=30, output_tokens=12)  # the copy of an answer is not counted again


async def test_a_cut_answer_gets_a_larger_budget_once(rig: Rig) -> None:
    batch_id = start(rig, 3, {"repair_length": "4x"}, max_tokens=8)
    engine = WatchedEngine(script(says("cut", reason="length", spent=8), says("cut later", reason="length", spent=32)))
    output = await run(rig, batch_id, engine)
    assert [sent["max_tokens"] for sent in bodies(engine)] == [8, 32]
    assert "seed" not in bodies(engine)[1]
    assert content(output[1]) == "cut later"
    assert rig.batch(batch_id).repairs == RepairCounts(0, 1, 1, 42)


async def test_a_budget_stays_within_the_context(rig: Rig) -> None:
    batch_id = start(rig, 3, {"repair_length": "5000"}, max_tokens=8)
    engine = WatchedEngine(script(says("cut", reason="length"), says("whole")), max_model_len=100)
    output = await run(rig, batch_id, engine)
    assert ([sent["max_tokens"] for sent in bodies(engine)], content(output[1])) == ([8, 90], "whole")
    assert rig.batch(batch_id).repairs == RepairCounts(1, 0, 1, 14)


async def test_cut_json_is_enlarged_first_and_asked_again_then(rig: Rig) -> None:
    batch_id = start(rig, 3, {"repair_length": "64", "repair_schema": "1"}, max_tokens=8, response_format=WANTED)
    engine = WatchedEngine(script(says('{"a', reason="length"), says(BAD), says(GOOD)))
    output = await run(rig, batch_id, engine)
    assert [(sent["max_tokens"], sent.get("seed")) for sent in bodies(engine)] == [(8, None), (64, None), (64, 1)]
    assert content(output[1]) == GOOD


async def test_a_batch_that_asks_for_nothing_is_left_alone(rig: Rig) -> None:
    batch_id = start(rig, 3, {"team": "docs"}, response_format=WANTED, max_tokens=8)
    engine = WatchedEngine(script(says(BAD, reason="length")))
    output = await run(rig, batch_id, engine)
    assert (content(output[1]), len(engine.asked), rig.batch(batch_id).repairs) == (BAD, 3, None)


async def test_a_line_that_is_given_up_in_its_rounds_keeps_its_answer(rig: Rig) -> None:
    batch_id = start(rig, 3, {"repair_schema": "5"}, response_format=WANTED)

    def no_restart() -> None:
        raise EngineFailure("gone")

    engine = WatchedEngine(script(says(BAD), EngineUnavailable("reset")), window=1, on_recover=no_restart)
    await rig.infer(batch_id, engine, policy=replace(FAST, chunk_attempts=1))
    rig.merge(batch_id)
    assert [content(row) for row in rig.output(batch_id)] == [GOOD, BAD]
    assert [row["error"]["code"] for row in rig.errors(batch_id)] == ["engine_failure"]
    assert rig.batch(batch_id).repairs == RepairCounts(0, 1, 0, 0)


async def test_a_reader_gets_accepted_answers_only(rig: Rig) -> None:
    batch_id = start(rig, 3, {"repair_schema": "2"}, response_format=WANTED)
    await rig.infer(batch_id, WatchedEngine(script(says(BAD), says(GOOD))))
    reader = PartialResults(rig.batch(batch_id), rig.store, rig.files, rig.workspace)
    reader.refresh()
    rows = [msgspec.json.decode(line) for line in reader.next_block().splitlines()]
    assert sorted(ids(rows)) == id_range(3)
    assert [content(row) for row in rows] == [GOOD] * 3


class Flaky(WatchedEngine):
    """Answers well or badly by what was asked alone, and dies for good after so many answers."""

    def __init__(self, dies_after: int, **options: Any) -> None:
        super().__init__(on_recover=self._refuse, **options)
        self.left = dies_after

    def _refuse(self) -> None:
        raise EngineFailure("the engine does not come back")

    async def answer(self, model: Model, request: EngineRequest) -> EngineAnswer:
        await asyncio.sleep(0)
        if self.left <= 0:
            raise EngineUnavailable("reset")
        self.left -= 1
        self.requests.append(request)
        body = msgspec.json.decode(request.body)
        line, seed = line_of(request), body.get("seed", 0)
        flaws = random.Random(line * 7919).randrange(4)
        if line % 5 == 0 and body["max_tokens"] == 8:
            return says("cut", reason="length")
        return says(GOOD if seed >= flaws else f'{{"seed":{seed}}}')


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 8))
@settings(max_examples=25)
def test_the_same_output_after_any_deaths(deaths: list[int], window: int) -> None:
    """Rounds that are on disk are not asked again, whatever died in between: the same answers, counts and tokens."""
    metadata = {"repair_schema": "2", "repair_length": "64"}

    async def play(folder: str, lives: list[int]) -> tuple[Any, Any, Any, int]:
        rig = Rig(Path(folder))
        batch_id = start(rig, 20, metadata, response_format=WANTED, max_tokens=8)
        sent = 0
        for life in (*lives, 10_000):
            engine = Flaky(life, window=window)
            try:
                await rig.infer(batch_id, engine, policy=replace(FAST, chunk_attempts=100))
            except EngineFailure:
                continue
            finally:
                sent += len(engine.requests)
            break
        rig.merge(batch_id)
        batch = rig.batch(batch_id)
        return rig.output(batch_id), batch.repairs, batch.usage, sent

    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as rough:
        undisturbed, disturbed = asyncio.run(play(calm, [])), asyncio.run(play(rough, deaths))
    assert disturbed == undisturbed
