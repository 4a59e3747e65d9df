"""The curated dataset of a finished batch: which rows it has, in which files, and that a rerun doubles nothing."""

from dataclasses import asdict
from typing import Any

import msgspec
import polars
import pytest

from tests.unit.conftest import Rig, answer_of, request_line, request_lines
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.core.curation import CuratedRow
from vllm_batch_dagster.core.curation_rules import CurationRules, DatasetFilters, parse_rules
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest
from vllm_batch_dagster.core.states import BatchEvent
from vllm_batch_dagster.stages import candidates
from vllm_batch_dagster.stages.curation import CurationReport, curate_batch, review_rows
from vllm_batch_dagster.stages.push_records import PushRecord, PushState, failed_pushes, read_push, write_push

CHAT_BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "same question"}]}


def curate(rig: Rig, batch_id: str, rules: CurationRules | None = None) -> CurationReport:
    return curate_batch(rig.batch(batch_id), rig.store, rig.files, rig.workspace, rules or CurationRules())


def rows_of(report: CurationReport) -> list[dict[str, Any]]:
    return polars.read_parquet(report.path / "*.parquet").sort("line").to_dicts()


async def finish(rig: Rig, lines: bytes | int, engine: EchoEngine) -> str:
    batch_id = rig.start(lines, chunk_size=3)
    await rig.infer(batch_id, engine)
    rig.merge(batch_id)
    return batch_id


def says(text: str, reason: str = "stop", tokens: int = 5) -> bytes:
    said = {"model": "tiny", "choices": [{"finish_reason": reason, "message": {"content": text}}]}
    return msgspec.json.encode(said | {"usage": {"prompt_tokens": 2, "completion_tokens": tokens}})


def by_content(request: EngineRequest) -> EngineAnswer | None:
    for word, answer in {
        b"refuse": answer_of(b'{"error":{"message":"no"}}', 400),
        b"silent": answer_of(says("  ")),
        b"long": answer_of(says("cut in the mid", "length")),
        b"short": answer_of(says("ok", tokens=1)),
    }.items():
        if word in request.body:
            return answer
    return answer_of(says("An answer."))


async def test_rows_are_selected_by_the_rules_and_each_prompt_once(rig: Rig) -> None:
    names = ("good", "refuse", "silent", "long", "short")
    twice = request_line("first", body=CHAT_BODY) + request_line("second", body=CHAT_BODY)
    content = b"".join(request_line(name) for name in names) + twice
    batch_id = await finish(rig, content, EchoEngine(by_content))
    report = curate(rig, batch_id, CurationRules(dataset=DatasetFilters(min_output_tokens=2)))
    assert report.refused == {
        "request_failed": 1,
        "no_text": 1,
        "not_finished": 1,
        "too_short": 1,
        "repeated_prompt": 1,
    }
    rows = rows_of(report)
    assert report.kept == len(rows) == 2
    assert [(row["custom_id"], row["line"]) for row in rows] == [("good", 0), ("first", 5)]
    assert rows[1] == asdict(
        CuratedRow(
            batch_id=batch_id,
            line=5,
            custom_id="first",
            model="tiny",
            prompt="same question",
            messages='[{"role":"user","content":"same question"}]',
            answer="An answer.",
            finish_reason="stop",
            input_tokens=2,
            output_tokens=5,
            prompt_hash=rows[1]["prompt_hash"],
        )
    )
    assert report.bytes == sum(path.stat().st_size for path in report.path.iterdir())
    assert report.path == rig.folder / "datasets" / "curated" / f"batch={batch_id}"


async def test_a_prompt_whose_first_answer_was_refused_gets_another_chance(rig: Rig) -> None:
    texts = iter([says("cut", "length"), says("whole")])
    lines = request_line("first", body=CHAT_BODY) + request_line("second", body=CHAT_BODY)
    batch_id = await finish(rig, lines, EchoEngine(lambda _request: answer_of(next(texts)), window=1))
    assert [row["custom_id"] for row in rows_of(curate(rig, batch_id))] == ["second"]


async def test_a_rerun_doubles_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "ROWS_PER_PART", 2)
    batch_id = await finish(rig, 7, EchoEngine(by_content))
    first = curate(rig, batch_id)
    before = rows_of(first)
    assert [path.name for path in sorted(first.path.iterdir())] == [f"part-0000{n}.parquet" for n in range(4)]
    assert [row["line"] for row in before] == list(range(7))
    # What a run that was killed leaves behind.
    rest = first.path.with_name(first.path.name + ".new")
    rest.mkdir()
    (rest / "part-00009.parquet").write_bytes(b"half")
    monkeypatch.setattr(candidates, "ROWS_PER_PART", 5)
    second = curate(rig, batch_id)
    assert [path.name for path in sorted(second.path.iterdir())] == ["part-00000.parquet", "part-00001.parquet"]
    assert rows_of(second) == before
    assert [path.name for path in second.path.parent.iterdir()] == [second.path.name]


async def test_a_new_answer_replaces_the_old_row(rig: Rig) -> None:
    batch_id = await finish(rig, 4, EchoEngine(by_content))
    curate(rig, batch_id)
    await rig.infer(batch_id, EchoEngine(lambda _request: answer_of(says("Better."))), only={1}, fresh={1})
    rig.merge(batch_id)
    assert [row["answer"] for row in rows_of(curate(rig, batch_id))] == ["An answer."] * 3 + ["Better."]


async def test_unanswered_lines_are_passed_over(rig: Rig) -> None:
    batch_id = rig.start(6, chunk_size=3)
    await rig.infer(batch_id, EchoEngine(by_content), only={1})
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, 0)
    rig.merge(batch_id)
    assert [row["line"] for row in rows_of(curate(rig, batch_id))] == [3, 4, 5]


async def test_nothing_kept_is_an_empty_dataset(rig: Rig) -> None:
    batch_id = await finish(rig, 2, EchoEngine(lambda _request: answer_of(b'{"data":[]}')))
    report = curate(rig, batch_id)
    assert (report.kept, report.refused, report.bytes) == (0, {"no_text": 2}, 0)
    assert list(report.path.iterdir()) == []


async def test_what_python_cannot_read_is_refused_and_does_not_stop_the_rest(rig: Rig) -> None:
    content = request_lines(1) + request_line("vast", body=CHAT_BODY | {"x": msgspec.Raw(b"1e999")})
    batch_id = await finish(rig, content, EchoEngine(by_content))
    report = curate(rig, batch_id)
    assert [row["custom_id"] for row in rows_of(report)] == ["id-0"]
    assert report.refused == {"unreadable": 1}


def choices(*texts: str, reason: str = "stop") -> bytes:
    made = [{"message": {"content": text}, "finish_reason": reason} for text in texts]
    return msgspec.json.encode({"model": "tiny", "choices": made, "usage": {"completion_tokens": 5}})


def review_of(report: CurationReport) -> dict[str, list[str]]:
    return {row["custom_id"]: row["rules"] for row in review_rows(report.review_path)}


async def test_every_rule_finds_its_rows_and_each_row_says_why(rig: Rig) -> None:
    json_body = CHAT_BODY | {"response_format": {"type": "json_object"}}
    lines = request_line("prose", body=json_body) + request_line("json", body=json_body | {"seed": 1})
    lines += request_line("cut") + request_line("split") + request_line("sure")
    said = {
        b'"seed"': choices('{"a": 1}'),
        b"json_object": choices("no JSON"),
        b"cut": choices("cut in the", reason="length"),
        b"split": choices("yes", "no", "perhaps"),
    }
    engine = EchoEngine(
        lambda request: answer_of(next((body for word, body in said.items() if word in request.body), choices("fine")))
    )
    report = curate(rig, await finish(rig, lines, engine), parse_rules(TELLING))
    assert review_of(report) == {"prose": ["schema_failure"], "cut": ["truncated"], "split": ["disagreement"]}
    assert report.selected_by_rule == {"schema_failure": 1, "truncated": 1, "disagreement": 1}
    (row,) = (each for each in review_rows(report.review_path) if each["custom_id"] == "split")
    assert (row["answers"], row["score"]) == (["yes", "no", "perhaps"], 1.0)


TELLING = {
    "review": {"rules": [{"rule": "schema_failure"}, {"rule": "truncated"}, {"rule": "disagreement"}], "filters": {}}
}


async def test_a_sample_stays_the_same_in_a_rerun_and_with_other_chunks(rig: Rig) -> None:
    rules = parse_rules({"review": {"rules": [{"rule": "random", "n": 4}]}})
    engine = EchoEngine(by_content)
    first = await finish(rig, 20, engine)
    chosen = set(review_of(curate(rig, first, rules)))
    assert len(chosen) == 4
    assert set(review_of(curate(rig, first, rules))) == chosen
    other = rig.start(20, chunk_size=7)
    await rig.infer(other, engine)
    rig.merge(other)
    assert set(review_of(curate(rig, other, rules))) == chosen


async def test_near_duplicates_are_left_out_of_either(rig: Rig) -> None:
    base = " ".join(f"word{number}" for number in range(30))
    texts = [base, f"{base} more", f"{base} and", "something else altogether, you see"]
    bodies = [{"model": "tiny", "messages": [{"role": "user", "content": text}]} for text in texts]
    lines = b"".join(request_line(f"id-{number}", body=body) for number, body in enumerate(bodies))
    near = {"duplicates": {"of": "prompt", "similarity": 0.8}}
    rules = parse_rules({"dataset": near, "review": {"filters": near, "rules": [{"rule": "random", "n": 9}]}})
    report = curate(rig, await finish(rig, lines, EchoEngine(by_content)), rules)
    assert report.refused == {"similar_prompt": 2}
    assert [row["custom_id"] for row in rows_of(report)] == list(review_of(report)) == ["id-0", "id-3"]


async def test_parts_are_bounded_in_bytes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "BYTES_PER_PART", 1)
    report = curate(rig, await finish(rig, 4, EchoEngine(by_content)))
    assert len(list(report.path.glob("*.parquet"))) == 4
    assert [row["line"] for row in rows_of(report)] == [0, 1, 2, 3]


async def test_how_the_push_went_is_kept_beside_the_selection(rig: Rig) -> None:
    report = curate(rig, await finish(rig, 2, EchoEngine(by_content)))
    batch_id = report.review_path.name.removeprefix("batch=")
    assert read_push(report.review_path) is None
    assert list(failed_pushes(rig.workspace)) == [batch_id]
    for state, failed in ((PushState.FAILED, [batch_id]), (PushState.OFF, []), (PushState.DONE, [])):
        write_push(report.review_path, PushRecord(state, 1.0, "why"))
        assert read_push(report.review_path) == PushRecord(state, 1.0, "why")
        assert list(failed_pushes(rig.workspace)) == failed
    assert len(list(review_rows(report.review_path))) == 2
