"""Batches on the real vLLM through the whole stack: the main job, bad input, other endpoints, deaths, reruns."""

import os
import signal

import openai
import psutil
import pytest

from tests.dagster_ui import DagsterUi
from tests.e2e.batches import BATCH_SECONDS, chat, finish, ids, read, request, submit, wait
from tests.e2e.conftest import CHAT, EMBEDDINGS
from tests.stack import STOP_SECONDS, Stack, descendants, wait_for
from vllm_batch_dagster.adapters.engine import engine_status
from vllm_batch_dagster.cli.processes import is_alive, run_workers
from vllm_batch_dagster.composition import build_store
from vllm_batch_dagster.settings import Settings

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

SLOTS = 6


def cells(batch_id: str, count: int) -> list[str]:
    return [f"{batch_id}|{index:04d}" for index in range(count)]


def sent_of(ui: DagsterUi, batch_id: str, chunks: int) -> list[tuple[int, int, int]]:
    """Return (lines, lines sent by the attempt that was published, lines it found in the journals) of each chunk."""
    newest = [ui.materializations("chunk_results", cell)[0] for cell in cells(batch_id, chunks)]
    return [(each["requests"], each["sent"], each["resumed_from_journal"]) for each in newest]


def kept_of(ui: DagsterUi, batch_id: str, chunks: int) -> int:
    """Return the lines that a second run did not send: those in the journals, and those of chunks that the first had
    published (a fast engine answers all lines of a chunk within one look at the counts)."""
    newest = [ui.materializations("chunk_results", cell)[0] for cell in cells(batch_id, chunks)]
    return sum(each["requests"] if each["attempt"] == 1 else each["resumed_from_journal"] for each in newest)


def test_bad_lines_fail_the_batch_and_start_no_engine(real_stack: Stack, client: openai.OpenAI) -> None:
    good = chat(1, CHAT)
    lines = [
        good,
        {**good, "method": None},
        {**chat(3, CHAT), "url": "/v1/completions"},
        good,
        chat(5, "nobody/knows-it"),
        chat(6, CHAT, stream=True),
    ]
    batch = finish(client, submit(client, lines).id)

    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    found = [(error.line, error.code, error.param) for error in batch.errors.data]
    assert found == [
        (2, "missing_required_parameter", "method"),
        (3, "invalid_url", "url"),
        (4, "duplicate_custom_id", "custom_id"),
        (5, "model_not_found", "body.model"),
        (6, "streaming_unsupported", "body.stream"),
    ]
    assert all(error.message for error in batch.errors.data)
    assert real_stack.status()["engine"] is None


def test_empty_and_broken_files_fail(client: openai.OpenAI, real_stack: Stack) -> None:
    broken = b'{"custom_id": "a", "method": "POST"\n'
    contents = {"empty_file": b"\n\n", "invalid_json_line": broken}
    batches = {code: submit(client, content) for code, content in contents.items()}
    for code, submitted in batches.items():
        batch = finish(client, submitted.id)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [error.code for error in batch.errors.data or ()] == [code]
    assert real_stack.status()["engine"] is None


def last_answer_of(stack: Stack, batch_id: str) -> float:
    """Return when the last line was answered, in unix seconds."""
    chunks = build_store(Settings(vllm_batch_home=stack.home, _env_file=None)).chunks.list(batch_id)
    return max(chunk.summary.last_answer_at for chunk in chunks if chunk.summary is not None)


def engine_pid(stack: Stack) -> int:
    """Read from the engine's record, at once: asking `status` takes seconds, in which the batch may end."""
    status = engine_status(stack.home / "engine")
    assert status is not None
    return status.pid


def test_three_hundred_lines_in_three_chunks(real_stack: Stack, client: openai.OpenAI, ui: DagsterUi) -> None:
    lines = [chat(number, CHAT) for number in range(300)]
    batch = submit(client, lines)
    assert batch.status == "validating"
    batch = finish(client, batch.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (300, 300, 0)
    assert batch.error_file_id is None
    answers = read(client, batch.output_file_id)
    assert ids(answers) == ids(lines)
    assert all(answer["response"]["status_code"] == 200 and answer["error"] is None for answer in answers)
    bodies = [answer["response"]["body"] for answer in answers]
    assert all(body["choices"][0]["message"]["content"].strip() for body in bodies)
    assert batch.usage is not None
    assert batch.usage.output_tokens == sum(body["usage"]["completion_tokens"] for body in bodies)
    marks = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert list(marks) == sorted(mark for mark in marks if mark is not None)
    shown = [ui.materializations("chunk_results", cell) for cell in cells(batch.id, SLOTS)]
    assert shown[0][0]["at"] / 1000 < last_answer_of(real_stack, batch.id), "it is shown before the last one is done"
    assert [[event["requests"] for event in events] for events in shown] == [[100], [100], [100], [0], [0], [0]]


def test_a_chunk_that_is_run_again_changes_the_merged_output(client: openai.OpenAI, ui: DagsterUi) -> None:
    batch = finish(client, submit(client, [chat(number, CHAT, temperature=1) for number in range(150)]).id)
    before = read(client, batch.output_file_id)
    ui.rerun("chunk_results", [f"{batch.id}|0001"])
    wait_for(lambda: client.batches.retrieve(batch.id).output_file_id != batch.output_file_id, BATCH_SECONDS)

    again = client.batches.retrieve(batch.id)
    assert again.status == "completed"
    after = read(client, again.output_file_id)
    assert ids(after) == ids(before)
    assert after[:100] == before[:100], "the chunk that was not asked for is as it was"
    assert after[100:] != before[100:]
    assert len(ui.materializations("chunk_results", f"{batch.id}|0001")) == 2
    assert len(ui.materializations("chunk_results", f"{batch.id}|0000")) == 1
    wait_for(lambda: len(ui.materializations("merged_output", batch.id)) == 2, BATCH_SECONDS)


def test_lines_that_the_engine_refuses_go_to_the_error_file(client: openai.OpenAI) -> None:
    too_long = [{"role": "user", "content": "word " * 9000}]
    lines = [
        chat(0, CHAT),
        chat(1, CHAT, temperature=-1),
        request("line-2", "/v1/chat/completions", model=CHAT, messages=too_long),
    ]
    batch = finish(client, submit(client, lines).id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 2)
    assert ids(read(client, batch.output_file_id)) == ["line-0"]
    errors = read(client, batch.error_file_id)
    assert ids(errors) == ["line-1", "line-2"]
    assert [error["response"]["status_code"] for error in errors] == [400, 400]
    assert "temperature" in errors[0]["response"]["body"]["error"]["message"]


ENDPOINTS = {
    "/v1/completions": ({"model": CHAT, "prompt": "Once upon a time", "max_tokens": 8}, "choices"),
    "/v1/responses": ({"model": CHAT, "input": "Say hello.", "max_output_tokens": 8}, "output"),
    "/v1/embeddings": ({"model": EMBEDDINGS, "input": "a cat"}, "data"),
    "/v1/score": ({"model": EMBEDDINGS, "text_1": "a cat", "text_2": ["a dog", "a plane"]}, "data"),
    "/v1/rerank": ({"model": EMBEDDINGS, "query": "Paris", "documents": ["a city", "a fruit"]}, "results"),
}


def test_every_endpoint_of_the_engine(client: openai.OpenAI) -> None:
    """All at once: the engine is swapped to the pooling model when nobody uses the other one any more."""
    batches = {url: submit(client, [request("only", url, **body)], url) for url, (body, _) in ENDPOINTS.items()}
    for url, (_, key) in ENDPOINTS.items():
        batch = finish(client, batches[url].id)
        assert (batch.status, batch.error_file_id) == ("completed", None), url
        assert read(client, batch.output_file_id)[0]["response"]["body"][key], url


def test_a_lenient_file_of_two_models_and_endpoints(client: openai.OpenAI) -> None:
    """As Parasail's client sends rerank requests (contract G.2): to /v1/score, under the endpoint of its first line."""
    rerank = {"model": EMBEDDINGS, "query": "Paris", "documents": ["a fruit", "the capital of France"], "top_n": 1}
    lines = [
        request("rerank", "/v1/score", **rerank),
        chat(0, CHAT),
        chat(0, "nobody/knows-it"),
        request("embed", "/v1/embeddings", model=EMBEDDINGS, input="a cat"),
    ]
    batch = finish(client, submit(client, lines, metadata={"validation": "lenient"}).id)
    assert (batch.status, batch.model) == ("completed", None)
    answers, (refused,) = read(client, batch.output_file_id), read(client, batch.error_file_id)
    assert ids(answers) == ["rerank", "line-0", "embed"]
    assert [result["index"] for result in answers[0]["response"]["body"]["results"]] == [1]
    assert (refused["custom_id"], refused["error"]["code"]) == ("invalid-line-3", "model_not_found")


def test_a_killed_run_sends_only_the_missing_lines_again(
    real_stack: Stack, client: openai.OpenAI, ui: DagsterUi
) -> None:
    lines = [chat(number, CHAT, max_tokens=32) for number in range(200)]
    batch = submit(client, lines)
    seen = wait(client, batch.id, lambda seen: bool(seen.request_counts and seen.request_counts.completed >= 40))
    assert seen.status == "in_progress"
    for worker in run_workers(real_stack.pid_of("code")):
        worker.kill()

    batch = finish(client, batch.id)
    assert batch.status == "completed"
    assert ids(read(client, batch.output_file_id)) == ids(lines)
    assert all(sent + resumed == total for total, sent, resumed in sent_of(ui, batch.id, 2))
    assert kept_of(ui, batch.id, 2) >= 40
    assert "lines answered by earlier attempts, sending" in real_stack.said()


def test_a_killed_engine_costs_only_the_lines_in_flight(
    real_stack: Stack, client: openai.OpenAI, ui: DagsterUi
) -> None:
    lines = [chat(number, CHAT, max_tokens=32) for number in range(200)]
    batch = submit(client, lines)
    wait(client, batch.id, lambda seen: bool(seen.request_counts and seen.request_counts.completed >= 40))
    engine = engine_pid(real_stack)
    core = next(child for child in descendants(engine) if "EngineCore" in "".join(child.cmdline()) + child.name())
    core.kill()

    batch = finish(client, batch.id)
    assert batch.status == "completed"
    assert ids(read(client, batch.output_file_id)) == ids(lines)
    assert all(sent == total for total, sent, _ in sent_of(ui, batch.id, 2)), "each line has one answer, of one run"
    assert int(real_stack.status()["engine"]["pid"]) != engine
    assert [run["status"] for run in ui.runs(batch.id)] == ["SUCCESS"] * 3


def test_a_killed_api_server_leaves_no_orphan(real_stack: Stack, client: openai.OpenAI) -> None:
    """Its EngineCore and worker would hold the memory that the next engine needs."""
    lines = [chat(number, CHAT, max_tokens=32) for number in range(150)]
    batch = submit(client, lines)
    wait(client, batch.id, lambda seen: bool(seen.request_counts and seen.request_counts.completed >= 20))
    engine = psutil.Process(engine_pid(real_stack))
    old = [engine, *engine.children(recursive=True)]
    engine.kill()
    batch = finish(client, batch.id)
    assert batch.status == "completed"
    assert ids(read(client, batch.output_file_id)) == ids(lines)
    wait_for(lambda: not any(map(is_alive, old)), STOP_SECONDS)


def test_ctrl_c_leaves_nothing(real_stack: Stack) -> None:
    """The last test of the module: the engine is warm, and goes with the stack."""
    up = psutil.Process(int(real_stack.status()["pid"]))
    engine = int(real_stack.status()["engine"]["pid"])
    seen = [*descendants(up.pid), psutil.Process(engine), *descendants(engine)]
    os.kill(up.pid, signal.SIGINT)
    wait_for(lambda: not is_alive(up), STOP_SECONDS)
    real_stack.assert_nothing_left(seen)
