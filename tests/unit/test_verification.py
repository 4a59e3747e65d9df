"""Verification: a good batch is good, in every state; one changed byte anywhere is found, and its place is named."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.conftest import Rig, WatchedEngine, answer, answer_of, line_of, request_line, request_lines
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.modes import ValidationMode
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest
from vllm_batch_dagster.core.provenance import EngineFact, ModelFact, make_origin
from vllm_batch_dagster.core.verification import Kind, VerifyReport
from vllm_batch_dagster.stages.manifests import read_manifest
from vllm_batch_dagster.stages.origins import OriginNotes
from vllm_batch_dagster.stages.verification import VerifyPorts, verify_batch


def verify(rig: Rig, batch_id: str) -> VerifyReport:
    return verify_batch(batch_id, VerifyPorts(rig.store, rig.files, rig.workspace))


def fail_some(request: EngineRequest) -> EngineAnswer | None:
    """Every fifth line is refused by the engine."""
    return answer_of(b'{"error":{"message":"no"}}', 400) if line_of(request) % 5 == 4 else None


async def merged(rig: Rig, lines: int | bytes = 23, chunk_size: int = 6) -> str:
    batch_id = rig.start(lines, chunk_size)
    await rig.infer(batch_id, EchoEngine(fail_some))
    rig.merge(batch_id)
    return batch_id


def files_of(rig: Rig, batch_id: str) -> dict[Kind, list[Path]]:
    """Every file of a merged batch, by its kind."""
    batch = rig.batch(batch_id)
    folder, files = rig.folder / "batches" / batch_id, rig.folder / "files"
    return {
        Kind.INPUT: [files / batch.input_file_id],
        Kind.OUTPUT: [files / str(batch.output_file_id)],
        Kind.ERRORS: [files / str(batch.error_file_id)],
        Kind.INDEX: [folder / "index.bin"],
        Kind.JOURNAL: sorted(folder.glob("journal/*/*.jsonl")),
        Kind.RESULT: sorted(folder.glob("results/*.idx")),
        Kind.MANIFEST: sorted(folder.glob("manifest.*.json")),
    }


async def test_a_finished_batch_is_good(rig: Rig) -> None:
    report = verify(rig, await merged(rig))
    assert (report.problems, report.notes) == ([], [])
    assert (report.checked["lines"], report.checked["answers"]) == (23, 23)
    assert report.is_published


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.RECORD])
async def test_one_changed_byte_in_any_file_is_found_and_its_file_named(rig: Rig, kind: Kind) -> None:
    batch_id = await merged(rig)
    choice = random.Random(kind.value)
    for path in files_of(rig, batch_id)[kind]:
        content = path.read_bytes()
        places = {0, len(content) - 1, *(choice.randrange(len(content)) for _ in range(60))}
        for place in sorted(places):
            changed = bytearray(content)
            changed[place] ^= 1 << choice.randrange(8)
            path.write_bytes(changed)
            report = verify(rig, batch_id)
            assert report.problem_count, f"{path.name} at {place}"
            assert {problem.kind for problem in report.problems} == {kind}, (path.name, place, report.problems)
            assert all(problem.file and problem.mend for problem in report.problems)
        path.write_bytes(content)
    assert verify(rig, batch_id).is_good


async def test_a_changed_byte_of_the_output_is_named_to_the_byte(rig: Rig) -> None:
    batch_id = await merged(rig)
    path = files_of(rig, batch_id)[Kind.OUTPUT][0]
    content = path.read_bytes()
    starts = [0]
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for place in (starts[3] + 20, starts[4] - 1, starts[7]):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        (problem,) = verify(rig, batch_id).problems
        line = next(number for number, start in enumerate(starts) if start > place)
        assert (problem.line, problem.offset) == (line, place)


async def test_a_damaged_answer_names_the_line_the_record_and_the_chunk_to_run_again(rig: Rig) -> None:
    batch_id = await merged(rig)
    path = files_of(rig, batch_id)[Kind.JOURNAL][1]
    content = path.read_bytes()
    starts = [0, *(at + 1 for at, byte in enumerate(content) if byte == 10)]
    path.write_bytes(content[: starts[2] + 40] + b"\x00" + content[starts[2] + 41 :])
    (problem,) = verify(rig, batch_id).problems
    assert (problem.file, problem.offset) == ("journal/0001/000001.jsonl", starts[2])
    record = msgspec.json.decode(content[starts[2] + 18 : starts[3]])
    assert problem.line == record["line"] + 1
    assert f"{batch_id}|0001 of chunk_results" in problem.mend


@pytest.mark.parametrize("kind", [Kind.OUTPUT, Kind.ERRORS])
@pytest.mark.parametrize("change", ["cut", "lost line", "doubled line", "more"])
async def test_lost_doubled_and_foreign_lines_are_found(rig: Rig, kind: Kind, change: str) -> None:
    batch_id = await merged(rig)
    path = files_of(rig, batch_id)[kind][0]
    lines = path.read_bytes().splitlines(keepends=True)
    changed = {
        "cut": [*lines[:-1], lines[-1][:-9]],
        "lost line": lines[:1] + lines[2:],
        "doubled line": lines[:2] + lines[1:],
        "more": [*lines, lines[0]],
    }
    path.write_bytes(b"".join(changed[change]))
    report = verify(rig, batch_id)
    assert {problem.kind for problem in report.problems} == {kind}
    assert min(problem.line or 0 for problem in report.problems) > 0


async def test_a_swapped_pair_of_lines_is_found(rig: Rig) -> None:
    batch_id = await merged(rig)
    path = files_of(rig, batch_id)[Kind.OUTPUT][0]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    assert [problem.line for problem in verify(rig, batch_id).problems] == [1, 2]


async def test_what_is_missing_is_named(rig: Rig) -> None:
    for kind in (Kind.OUTPUT, Kind.INDEX, Kind.JOURNAL, Kind.RESULT, Kind.MANIFEST):
        batch_id = await merged(rig)
        files_of(rig, batch_id)[kind][0].unlink()
        assert verify(rig, batch_id).has(kind), kind


async def test_a_deleted_input_is_no_problem(rig: Rig) -> None:
    batch_id = await merged(rig)
    rig.store.files.delete(rig.batch(batch_id).input_file_id)
    rig.files.delete(rig.batch(batch_id).input_file_id)
    report = verify(rig, batch_id)
    assert report.is_good
    assert "was deleted" in report.notes[0]


async def test_an_open_batch_is_checked_as_far_as_it_goes(rig: Rig) -> None:
    batch_id = rig.start(10, chunk_size=5)
    await rig.infer(batch_id, EchoEngine(), only=[0])
    attempt = rig.begin(batch_id, 1)
    for line in list(attempt.pending_lines())[:3]:
        answer(line)
    path = rig.workspace.journal_path(batch_id, 1, 1)
    with path.open("ab") as journal:
        journal.write(b"000000ff 0000")  # a record on its way
    report = verify(rig, batch_id)
    assert report.is_good
    assert any("1 of 2 chunks" in note for note in report.notes)
    assert any("0001/000001.jsonl ends in the middle" in note for note in report.notes)
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)
    (problem,) = verify(rig, batch_id).problems
    assert (problem.kind, problem.offset, problem.mend.startswith("nothing")) == (Kind.JOURNAL, 0, True)
    attempt.close()


@pytest.mark.parametrize("kind", [Kind.INPUT, Kind.INDEX, Kind.JOURNAL, Kind.RESULT])
async def test_an_open_batch_with_a_changed_byte_is_found_without_a_manifest(rig: Rig, kind: Kind) -> None:
    batch_id = rig.start(10, chunk_size=5)
    await rig.infer(batch_id, EchoEngine(fail_some), only=[0])
    folder = rig.folder / "batches" / batch_id
    path = {
        Kind.INPUT: rig.folder / "files" / rig.batch(batch_id).input_file_id,
        Kind.INDEX: folder / "index.bin",
        Kind.JOURNAL: folder / "journal" / "0000" / "000001.jsonl",
        Kind.RESULT: folder / "results" / "0000.000001.idx",
    }[kind]
    content = path.read_bytes()
    choice = random.Random(1)
    for _ in range(80):
        place = choice.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << choice.randrange(8))]) + content[place + 1 :])
        assert verify(rig, batch_id).problem_count, place
    path.write_bytes(content)
    assert verify(rig, batch_id).is_good


async def test_gaps_refusals_and_two_models_are_verified_too(rig: Rig) -> None:
    rig.default_mode = ValidationMode.LENIENT
    body = {"model": "other", "messages": [{"role": "user", "content": "x"}]}
    mixed = request_lines(4) + b"no json\n" + request_line("other-1", body=body) + request_line("id-9")
    batch_id = rig.start(mixed, chunk_size=2)
    await rig.infer(batch_id, EchoEngine(), only=[0])
    for index in (1, 2, 3):
        attempt = rig.begin(batch_id, index)
        attempt.close()
        attempt.publish(reason="engine_failure")
    rig.merge(batch_id)
    report = verify(rig, batch_id)
    assert (report.problems, report.checked["answers"]) == ([], 2)
    path = files_of(rig, batch_id)[Kind.ERRORS][0]
    path.write_bytes(path.read_bytes().replace(b"could not", b"could_not", 1).replace(b"failed", b"faileD", 1))
    assert verify(rig, batch_id).has(Kind.ERRORS)


async def test_a_chunk_that_was_given_up_when_all_its_answers_were_there_is_whole(rig: Rig) -> None:
    """Cancelled, say, between the last answer and its publication: there is no gap that a reason could be for."""
    batch_id = rig.start(12, chunk_size=6)
    await rig.infer(batch_id, EchoEngine())
    attempt = rig.begin(batch_id, 1)
    attempt.close()
    summary = attempt.publish(reason="batch_cancelled")
    assert (summary.counts.completed, summary.error_codes) == (6, {})
    rig.merge(batch_id)
    report = verify(rig, batch_id)
    assert (report.problems, report.notes) == ([], [])


async def test_a_chunk_that_was_run_again_is_verified_as_it_was_merged(rig: Rig) -> None:
    batch_id = await merged(rig)
    await rig.infer(batch_id, WatchedEngine(), only=[1], fresh=[1])
    report = verify(rig, batch_id)
    assert report.problems == []
    assert any("chunk 0001 was run again" in note for note in report.notes)
    rig.merge(batch_id)
    report = verify(rig, batch_id)
    assert (report.problems, report.notes) == ([], [])
    assert len(files_of(rig, batch_id)[Kind.MANIFEST]) == 1


async def test_what_a_stale_run_appends_after_the_merge_is_only_noted(rig: Rig) -> None:
    batch_id = await merged(rig)
    path = files_of(rig, batch_id)[Kind.JOURNAL][0]
    with path.open("ab") as journal:
        journal.write(path.read_bytes()[:50])
    report = verify(rig, batch_id)
    assert report.is_good
    assert "taken for dead" in report.notes[0]


async def test_a_batch_that_failed_validation_has_only_its_input_to_check(rig: Rig) -> None:
    batch_id = rig.create(rig.upload(b"no json\n"))
    rig.validate(batch_id)
    report = verify(rig, batch_id)
    assert (report.is_good, report.is_published, report.status) == (True, False, "failed")


def test_an_unknown_batch_is_not_found(rig: Rig) -> None:
    with pytest.raises(NotFound):
        verify(rig, "batch_none")


async def test_the_manifest_says_what_gave_the_answers(rig: Rig) -> None:
    batch_id = rig.start(4, chunk_size=2)
    known = make_origin(EngineFact("own", ("1.0",), ("a",), "cpu", "auto", 5.0), ModelFact("tiny", "models/tiny"))
    await rig.infer(batch_id, EchoEngine())
    with OriginNotes(rig.workspace, lambda: known) as notes:
        notes.note(batch_id, 1, 1)
        notes.note(batch_id, 1, 1)
    report = rig.merge(batch_id)
    manifest = report.manifest
    assert manifest is not None
    assert manifest == read_manifest(files_of_manifest(rig, batch_id))
    assert [chunk.origins for chunk in manifest.chunks] == [(None,), (0,)]
    assert manifest.origins == (known,)
    assert "model.weights" in known.unknown
    assert "engine.device" not in known.unknown
    assert (manifest.counts.total, manifest.input and manifest.input.lines, manifest.chunk_lines) == (4, 4, 2)
    assert manifest.output is not None
    assert report.output is not None
    assert manifest.output.sha256 == report.output.sha256


def files_of_manifest(rig: Rig, batch_id: str) -> Path:
    (path,) = (rig.folder / "batches" / batch_id).glob("manifest.*.json")
    return path


def broken() -> Iterator[Any]:
    raise OSError(28, "No space left on device")


async def test_a_note_that_cannot_be_taken_costs_nothing(rig: Rig) -> None:
    batch_id = rig.start(2)
    with OriginNotes(rig.workspace, lambda: next(broken())) as notes:
        notes.note(batch_id, 0, 1)
    await rig.infer(batch_id, EchoEngine())
    manifest = rig.merge(batch_id).manifest
    assert manifest is not None
    assert manifest.chunks[0].origins == (None,)
