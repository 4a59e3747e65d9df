"""The official openai client in strict mode against a real server: what default mode would let pass fails here."""

import asyncio
import io
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Batch as WireBatch

from vllm_batch_dagster.core.models import Batch, LineError, RequestCounts, Usage
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchStatus

CONTENT = b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "tiny", "input": "hi"}}\n'


def create_batch(sdk: OpenAI, file_id: str = "file-unknown") -> WireBatch:
    return sdk.batches.create(input_file_id=file_id, endpoint="/v1/embeddings", completion_window="24h")


def test_03_17_every_way_to_hand_over_a_file(sdk: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(CONTENT)
    with path.open("rb") as opened:
        names = [
            sdk.files.create(file=given, purpose="batch").filename
            for given in (CONTENT, io.BytesIO(CONTENT), opened, path, ("named.jsonl", CONTENT))
        ]

    assert names == ["upload", "upload", "in.jsonl", "in.jsonl", "named.jsonl"]
    assert [sdk.files.content(file.id).content for file in sdk.files.list()] == [CONTENT] * 5


def test_04_17_create_retrieve_list_content_delete(sdk: OpenAI) -> None:
    file = sdk.files.create(file=CONTENT, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})

    assert file.expires_at == file.created_at + 3600
    assert sdk.files.retrieve(file.id).to_dict() == file.to_dict()
    assert [listed.id for listed in sdk.files.list()] == [file.id]
    assert sdk.files.content(file.id).text.encode() == CONTENT
    assert sdk.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.files.retrieve(file.id)
    assert missing.value.param == "id"
    assert missing.value.type == "invalid_request_error"


def test_12_the_client_pages_through_files(sdk: OpenAI) -> None:
    made = [sdk.files.create(file=CONTENT, purpose="batch").id for _ in range(4)]
    assert [file.id for file in sdk.files.list(limit=1, order="asc")] == made
    assert [file.id for file in sdk.files.list(limit=3)] == made[::-1]


def test_16_a_file_is_processed_at_once(sdk: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sdk.files.create(file=CONTENT, purpose="batch")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waited"))
    assert sdk.files.wait_for_processing(file.id).status == "processed"


def test_25_34_the_client_pages_through_batches(sdk: OpenAI) -> None:
    made = [create_batch(sdk).id for _ in range(3)]
    assert [batch.id for batch in sdk.batches.list(limit=1)] == made[::-1]


@pytest.mark.parametrize("status", list(BatchStatus))
def test_36_every_status_parses(sdk: OpenAI, store: BatchStore, status: BatchStatus) -> None:
    batch = Batch(
        id=f"batch_{status.value}",
        input_file_id="file-1",
        endpoint="/v1/embeddings",
        completion_window="24h",
        status=status,
        created_at=1_700_000_000,
        expires_at=1_700_086_400,
        metadata={"k": "v"},
        model="tiny",
        errors=(LineError("invalid_request", "Cannot find file.", "file_id"),) if status == "failed" else (),
        counts=RequestCounts(3, 2, 1),
        usage=Usage(1, 0, 2, 0),
        output_file_id="file-2",
        error_file_id="file-3",
    )
    store.batches.add(batch)

    parsed = sdk.batches.retrieve(batch.id)
    assert parsed.status == status.value
    assert parsed.metadata == {"k": "v"}
    assert (parsed.errors is not None) == (status == "failed")


def test_47_48_the_client_cancels(sdk: OpenAI) -> None:
    cancelled = sdk.batches.cancel(create_batch(sdk).id)
    assert cancelled.status == "cancelling"
    assert cancelled.cancelling_at is not None


def test_50_a_409_is_sent_once(sdk: OpenAI, store: BatchStore, base_url: str) -> None:
    batch = Batch("batch_1", "file-1", "/v1/embeddings", "24h", BatchStatus.COMPLETED, 1, 2)
    store.batches.add(batch)
    sent: list[str] = []
    sdk._client.event_hooks = {"request": [lambda request: sent.append(request.url.path)]}

    with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'completed'"):
        sdk.batches.cancel("batch_1")
    assert sent == ["/v1/batches/batch_1/cancel"]


def test_60_61_request_ids_reach_the_caller(sdk: OpenAI) -> None:
    file = sdk.files.create(file=CONTENT, purpose="batch")
    assert (file._request_id or "").startswith("req_")
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.batches.retrieve("batch_unknown")
    assert (missing.value.request_id or "").startswith("req_")
    assert missing.value.request_id != file._request_id


def test_62_organization_and_project_are_ignored(sdk: OpenAI) -> None:
    other = sdk.with_options(organization="org-x", project="proj-y", default_headers={"x-unknown": "1"})
    assert other.files.list().data == []


def test_the_catalogue_is_listed_with_aliases(sdk: OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["tiny", "tiny-latest"]


def test_15_a_loop_over_the_list_may_delete(sdk: OpenAI) -> None:
    for _ in range(3):
        sdk.files.create(file=CONTENT, purpose="batch")
    for file in sdk.files.list():
        sdk.files.delete(file.id)
    assert sdk.files.list().data == []


async def test_many_uploads_at_once_keep_their_contents(base_url: str, stored_files: Callable[[], int]) -> None:
    contents = [bytes([65 + n]) * (300_000 + n) for n in range(12)]
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="any") as sdk:
        made = await asyncio.gather(*(sdk.files.create(file=content, purpose="user_data") for content in contents))
        read = await asyncio.gather(*(sdk.files.content(file.id) for file in made))

    assert [answer.content for answer in read] == contents
    assert stored_files() == len(contents)
