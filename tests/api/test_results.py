"""GET /v1/batches/{id}/results: the output file's bytes, or a sentence that says why there are none."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from vllm_batch_dagster.core.models import Batch, File
from vllm_batch_dagster.core.ports import BatchStore, FileStore
from vllm_batch_dagster.core.states import BatchEvent

Lead = Callable[[str], str]


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


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing", "cancelling"])
def test_results_of_an_open_batch_say_its_status(client: TestClient, lead_to: Lead, status: str) -> None:
    answer = client.get(f"/v1/batches/{lead_to(status)}/results")

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "results_not_ready"
    assert f"'{status}'" in answer.json()["error"]["message"]


def test_results_without_a_success_name_the_error_file(client: TestClient, lead_to: Lead, store: BatchStore) -> None:
    batch_id = lead_to("completed")
    store.batches.amend(batch_id, error_file_id="file-errors")

    error = client.get(f"/v1/batches/{batch_id}/results").json()["error"]
    assert error["code"] == "no_output_file"
    assert "/v1/files/file-errors/content" in error["message"]
    failed = client.get(f"/v1/batches/{lead_to('failed')}/results").json()["error"]
    assert failed["code"] == "no_output_file"
