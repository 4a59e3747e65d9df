"""GET /v1/batches/{id}/results: finished lines of an open batch, files of one that has ended, and streams of both."""

import json
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from tests.unit.conftest import Rig, answer
from vllm_batch_dagster.core.models import Batch, File
from vllm_batch_dagster.core.ports import BatchStore, FileStore
from vllm_batch_dagster.core.states import BatchEvent
from vllm_batch_dagster.stages.attempts import ChunkAttempt

Lead = Callable[[str], str]


def give(attempt: ChunkAttempt, *numbers: int, ok: bool = True) -> None:
    """Answer these lines of the batch."""
    pending = {line.line: line for line in attempt.pending_lines()}
    for number in numbers:
        answer(pending[number], ok=ok)
    attempt.mirror_progress()


def finish(rig: Rig, batch_id: str, attempt: ChunkAttempt) -> None:
    attempt.publish()
    attempt.close()
    rig.merge(batch_id)


def ids(text: bytes | str) -> list[str]:
    return [json.loads(line)["custom_id"] for line in text.splitlines()]


def store_output(files: FileStore, batch: Batch, name: str, content: bytes) -> File:
    stored = files.create(f"file-{name}")
    stored.write(content)
    size, digest = stored.commit()
    return File(f"file-{name}", size, batch.created_at, f"{name}.jsonl", "batch_output", digest)


def test_results_are_the_bytes_of_the_output_file(
    client: TestClient, lead_to: Lead, store: BatchStore, files: FileStore
) -> None:
    batch_id = lead_to("finalizing")
    batch = store.batches.get(batch_id)
    output = store_output(files, batch, "output", b'{"id": "batch_req_1"}\n')
    store.batches.advance(batch_id, BatchEvent.PUBLISHED, batch.created_at, files=(output,), output_file_id=output.id)

    answer = client.get(f"/v1/batches/{batch_id}/results")
    assert (answer.status_code, answer.content) == (200, b'{"id": "batch_req_1"}\n')
    assert answer.headers["content-length"] == str(output.bytes)
    assert client.get(f"/v1/files/{output.id}").json()["purpose"] == "batch_output"
    part = client.get(f"/v1/batches/{batch_id}/results", headers={"range": "bytes=2-3"})
    assert (part.status_code, part.content) == (206, b"id")


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing", "cancelling"])
def test_results_of_an_open_batch_may_be_none(client: TestClient, lead_to: Lead, status: str) -> None:
    answer = client.get(f"/v1/batches/{lead_to(status)}/results")

    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == "application/jsonl"
    assert answer.headers["x-next-cursor"] == "v1"


def test_results_without_a_success_name_the_error_file(client: TestClient, lead_to: Lead, store: BatchStore) -> None:
    batch_id = lead_to("completed")
    store.batches.amend(batch_id, error_file_id="file-errors")

    error = client.get(f"/v1/batches/{batch_id}/results").json()["error"]
    assert error["code"] == "no_output_file"
    assert "/v1/files/file-errors/content" in error["message"]
    failed = client.get(f"/v1/batches/{lead_to('failed')}/results?follow=1").json()["error"]
    assert failed["code"] == "no_output_file"


def test_a_poller_gets_every_line_once_by_its_cursor(client: TestClient, rig: Rig) -> None:
    batch_id = rig.start(5)
    path, attempt = f"/v1/batches/{batch_id}/results", rig.begin(batch_id)
    give(attempt, 2, 0)
    first = client.get(path)
    assert ids(first.content) == ["id-2", "id-0"]
    give(attempt, 1)
    second = client.get(path, params={"after": first.headers["x-next-cursor"]})
    assert ids(second.content) == ["id-1"]
    give(attempt, 3, 4)
    finish(rig, batch_id, attempt)
    last = client.get(path, params={"after": second.headers["x-next-cursor"]})
    assert ids(last.content) == ["id-3", "id-4"]
    assert client.get(path, params={"after": last.headers["x-next-cursor"]}).content == b""
    whole = client.get(path)
    assert ids(whole.content) == [f"id-{number}" for number in range(5)]
    assert sorted(whole.content.splitlines()) == sorted((first.content + second.content + last.content).splitlines())


def test_errors_are_included_when_they_are_asked_for(client: TestClient, rig: Rig) -> None:
    batch_id = rig.start(5)
    path, attempt = f"/v1/batches/{batch_id}/results", rig.begin(batch_id)
    give(attempt, 0)
    give(attempt, 1, ok=False)
    assert ids(client.get(path).content) == ["id-0"]
    assert ids(client.get(path, params={"include": "errors"}).content) == ["id-0", "id-1"]
    attempt.close()
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    rig.merge(batch_id)
    assert ids(client.get(path).content) == ["id-0"]
    whole = client.get(path, params={"include": "errors"})
    assert ids(whole.content) == ["id-0", "id-1", "id-2", "id-3", "id-4"]
    assert whole.headers["content-length"] == str(len(whole.content))


def test_only_an_error_file_is_sent_alone(client: TestClient, rig: Rig) -> None:
    batch_id = rig.start(1)
    attempt = rig.begin(batch_id)
    give(attempt, 0, ok=False)
    finish(rig, batch_id, attempt)
    assert client.get(f"/v1/batches/{batch_id}/results").status_code == 404
    assert ids(client.get(f"/v1/batches/{batch_id}/results?include=errors").content) == ["id-0"]


@pytest.mark.parametrize(
    ("query", "param"),
    [("after=nonsense", "after"), ("after=v1_0-3", "after"), ("include=all", "include"), ("follow=x", "follow")],
)
def test_wrong_parameters_are_refused(client: TestClient, rig: Rig, query: str, param: str) -> None:
    answer = client.get(f"/v1/batches/{rig.start(1)}/results?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_journals_that_are_gone_leave_the_output_file(client: TestClient, rig: Rig) -> None:
    batch_id = rig.start(1)
    attempt = rig.begin(batch_id)
    give(attempt, 0)
    cursor = client.get(f"/v1/batches/{batch_id}/results").headers["x-next-cursor"]
    finish(rig, batch_id, attempt)
    rig.store.batches.amend(batch_id, purged_at=int(rig.clock()))
    gone = client.get(f"/v1/batches/{batch_id}/results", params={"after": cursor})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "results_gone")
    assert ids(client.get(f"/v1/batches/{batch_id}/results").content) == ["id-0"]


def test_head_of_results_has_the_headers_and_no_body(client: TestClient, rig: Rig) -> None:
    batch_id = rig.start(3)
    path, attempt = f"/v1/batches/{batch_id}/results", rig.begin(batch_id)
    give(attempt, 0)
    give(attempt, 1, ok=False)
    for query in ("", "?include=errors", "?follow=1"):
        head, got = client.head(path + query), client.get(path + query.replace("?follow=1", ""))
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["x-next-cursor"] == got.headers["x-next-cursor"]
    assert client.head(f"{path}?after=nothing").status_code == 400
    give(attempt, 2)
    finish(rig, batch_id, attempt)
    for query in ("", "?include=errors"):
        head, got = client.head(path + query), client.get(path + query, headers={"accept-encoding": "identity"})
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(got.content))
    assert client.head("/v1/batches/batch_none/results").status_code == 404
