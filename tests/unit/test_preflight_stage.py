"""The pre-flight of an input file: the same bad lines as validation, tokens, repeats, misfits, run time, no trace."""

import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import CHAT, DAY, Rig, request_line, request_lines
from vllm_batch_dagster.adapters.tokenizers import EstimatedCounter
from vllm_batch_dagster.core.models import Batch, ChunkSummary, Model, RequestCounts, Usage
from vllm_batch_dagster.core.modes import ValidationMode
from vllm_batch_dagster.core.preflight import OUTPUT_TOO_LONG, PROMPT_TOO_LONG, ContextLength, describe_sample
from vllm_batch_dagster.core.prompts import PromptLength, Prompts, TokenCounter
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.stages.measuring import PreflightBudget, PreflightPorts
from vllm_batch_dagster.stages.preflight import Preflight, inspect_batch, sketch_input
from vllm_batch_dagster.stages.validation import ValidationLimits


class WordCounter:
    """A token a word."""

    method, is_exact = "Counted by words.", True

    def count(self, prompts: Prompts) -> PromptLength:
        lengths = [len(str(message["content"]).split()) for message in prompts.messages]
        return PromptLength(sum(lengths), max(lengths, default=0))


class Facts:
    """The model `tiny` takes 10 tokens; nothing is known of `other`."""

    def counter(self, model: Model) -> TokenCounter:
        return WordCounter() if model.name == "tiny" else EstimatedCounter("it is far away")

    def context(self, model: Model) -> ContextLength | None:
        return ContextLength(10, "as the test says") if model.name == "tiny" else None


class SteppingClock:
    """A second passes at each look."""

    def __init__(self, start: float) -> None:
        self.now = start

    def __call__(self) -> float:
        self.now += 1
        return self.now


def said(custom_id: str, words: int, model: str = "tiny", **body: Any) -> bytes:
    message = {"role": "user", "content": " ".join(["word"] * words)}
    return request_line(custom_id, body={"model": model, "messages": [message], **body})


def look(rig: Rig, content: bytes, *, mode: ValidationMode = ValidationMode.STRICT, **options: Any) -> Preflight:
    clock = options.pop("clock", rig.clock)
    limits = ValidationLimits(5, 40, max_errors=options.pop("max_errors", 1000), mode=mode)
    now = int(rig.clock())
    batch = Batch("batch_x", rig.upload(content), CHAT, "24h", BatchStatus.VALIDATING, now, now + DAY)
    ports = PreflightPorts(rig.store, rig.files, rig.catalog, Facts(), clock)
    return inspect_batch(batch, ports, limits, PreflightBudget(**options))


def measure(rig: Rig, content: bytes, **options: Any) -> Any:
    found = look(rig, content, **options).measurement
    assert found is not None
    return found


def test_every_line_of_a_small_file_is_counted(rig: Rig) -> None:
    content = b"".join(said(f"id-{number}", number) for number in range(1, 9)) + b"\n"
    found = measure(rig, content)
    assert (found.lines, found.counted, found.examined, found.is_sampled) == (8, 8, 8, False)
    assert (found.input_tokens, found.longest) == (36, 8)
    assert found.lengths == ((1, 1), (2, 1), (4, 2), (8, 4))
    assert (found.repeats, found.repeats_exact, found.misfits) == (0, True, ())
    assert describe_sample(found) == "All 8 lines were counted."


def test_lines_that_will_not_fit_are_listed_with_their_numbers(rig: Rig) -> None:
    content = said("a", 10) + said("b", 11) + said("c", 3, max_tokens=11) + said("d", 6, max_tokens=6) + said("e", 30)
    found = measure(rig, content)
    listed = [(misfit.line, misfit.custom_id, misfit.code, misfit.tokens) for misfit in found.misfits]
    assert listed == [(2, "b", PROMPT_TOO_LONG, 11), (3, "c", OUTPUT_TOO_LONG, 11), (5, "e", PROMPT_TOO_LONG, 30)]
    assert (found.misfit_count, found.shortened) == (3, 1)
    assert measure(rig, said("b", 11, truncate_prompt_tokens=-1)).misfits == ()
    capped = measure(rig, content, listed=1)
    assert (len(capped.misfits), capped.misfit_count) == (1, 3)


def test_a_large_file_is_sampled_and_scaled_up_and_its_longest_lines_are_found(rig: Rig) -> None:
    lines = [said(f"id-{number}", 4) for number in range(1000)]
    lines[777] = said("long", 500)
    found = measure(rig, b"".join(lines), sample=100, longest=3)
    assert (found.lines, found.counted, found.is_sampled) == (1000, 100, True)
    assert 100 <= found.examined <= 103
    assert [misfit.line for misfit in found.misfits] == [778]
    assert sum(count for _bound, count in found.lengths) == 100
    assert "100 of 1000 lines" in describe_sample(found)
    assert found.loads[0].lines == 1000
    again = measure(rig, b"".join(lines), sample=100, longest=3)
    assert (again.lengths, again.input_tokens) == (found.lengths, found.input_tokens)


def test_counting_ends_when_the_time_is_over(rig: Rig) -> None:
    clock = SteppingClock(rig.clock())
    found = measure(rig, b"".join(said(f"id-{number}", 4) for number in range(100)), seconds=10.0, clock=clock)
    assert 1 <= found.counted <= 10
    assert found.input_tokens == 400
    none_left = measure(rig, said("a", 4) + said("b", 4), seconds=0.0, clock=clock)
    assert none_left.counted == 1


def test_bad_lines_are_those_of_validation_and_the_good_ones_are_counted(rig: Rig) -> None:
    content = said("a", 3) + b"nonsense\n" + said("a", 4) + request_line("c", url="/v1/other") + b'{"custom_id":7}\n'
    preflight = look(rig, content)
    batch_id = rig.create(rig.upload(content))
    assert preflight.report.errors == rig.validate(batch_id).errors
    assert {error.code for error in preflight.report.errors} > {"invalid_json_line", "duplicate_custom_id"}
    assert preflight.measurement is not None
    assert preflight.measurement.lines == 5
    assert len(look(rig, content, max_errors=2).report.errors) == 2


def test_repeated_requests_are_counted_though_their_ids_differ(rig: Rig) -> None:
    content = said("a", 3) + said("b", 3) + said("c", 4) + said("d", 3)
    assert measure(rig, content).repeats == 2


def test_a_file_that_is_not_there_or_empty_is_not_measured(rig: Rig) -> None:
    missing = look(rig, b"")
    assert missing.measurement is None
    assert missing.report.errors[0].code == "empty_file"


def test_lenient_mode_measures_each_model_by_its_own_facts(rig: Rig) -> None:
    content = said("a", 3) + said("b", 5, model="other") + said("c", 7, model="small") + b"nonsense\n"
    preflight = look(rig, content, mode=ValidationMode.LENIENT)
    assert (preflight.report.errors, preflight.report.rejected) == ((), 1)
    assert preflight.measurement is not None
    loads = {load.model: load for load in preflight.measurement.loads}
    assert loads.keys() == {"tiny", "other"}
    assert (loads["tiny"].lines, loads["tiny"].input_tokens, loads["tiny"].is_exact) == (2, 10, True)
    assert (loads["other"].lines, loads["other"].is_exact, loads["other"].context) == (1, False, None)


def test_the_run_time_is_learned_from_chunks_of_the_same_model(rig: Rig) -> None:
    assert measure(rig, said("a", 3)).run_time is None
    batch_id = rig.start(10)
    for chunk in rig.store.chunks.list(batch_id):
        attempt = rig.store.chunks.begin(batch_id, chunk.index, fresh=False, run_id="run", now=1)
        # 100 tokens in 10 seconds, 5 of them written for each of the 10 lines.
        seconds = {"first_sent_at": 10.0 * chunk.index, "last_answer_at": 10.0 * (chunk.index + 1)}
        summary = ChunkSummary(RequestCounts(10, 10, 0), Usage(50, 0, 50), sent_tokens=100, **seconds)
        rig.store.chunks.publish(attempt, summary, 2)

    found = measure(rig, said("a", 5) + said("b", 5))

    assert found.run_time is not None
    assert (found.run_time.seconds, found.run_time.chunks) == (2.0, 2)
    assert measure(rig, request_line("a", body={"model": "other", "messages": []})).run_time is None


def test_nothing_is_left_behind(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    look(rig, request_lines(20))
    look(rig, b"nonsense\n")
    assert list(scratch.iterdir()) == []
    assert not (rig.folder / "batches").exists()
    assert rig.store.batches.list().data == ()


def test_a_sketch_through_the_index_counts_the_sample_only(rig: Rig) -> None:
    batch_id = rig.start(b"".join(said(f"id-{number}", 4) for number in range(50)))
    ports = PreflightPorts(rig.store, rig.files, rig.catalog, Facts(), rig.clock)
    found = sketch_input(rig.batch(batch_id), ports, rig.workspace, PreflightBudget(sample=10, longest=0))
    assert (found.lines, found.counted, found.input_tokens, found.repeats) == (50, 10, 200, None)
