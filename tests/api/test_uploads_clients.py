"""Uploads in parts by real clients, item 24 of the contract's checklist: many at once, in projects, within limits."""

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI
from starlette.testclient import TestClient

from api_shim.deps import get_project
from api_shim.turns import Turns
from tests.api.upload_routes import PARAMS, Parts, read_error

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "tiny", "input": "hi"}}\n'


def test_24_the_official_client_uploads_in_chunks_and_runs_a_batch(sdk: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_bytes(LINE * 1000)

    upload = sdk.uploads.upload_file_chunked(
        file=path,
        mime_type="application/jsonl",
        purpose="batch",
        part_size=10_000,
        md5=hashlib.md5(path.read_bytes()).hexdigest(),
    )

    assert upload.status == "completed"
    assert upload.file is not None
    assert upload.file.filename == "big.jsonl"
    assert sdk.files.content(upload.file.id).content == path.read_bytes()
    batch = sdk.batches.create(input_file_id=upload.file.id, endpoint="/v1/embeddings", completion_window="24h")
    assert batch.status == "validating"


def test_24_bytes_in_memory_and_cancel(sdk: OpenAI) -> None:
    upload = sdk.uploads.upload_file_chunked(
        file=LINE, filename="mem.jsonl", bytes=len(LINE), mime_type="application/jsonl", purpose="batch"
    )
    assert upload.file is not None
    begun = sdk.uploads.create(filename="x", purpose="batch", bytes=1, mime_type="text/plain")
    assert sdk.uploads.cancel(begun.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        sdk.uploads.parts.create(begun.id, data=b"x")


async def test_parts_may_come_all_at_once(base_url: str) -> None:
    blocks = [bytes([65 + number]) * (100_000 + number) for number in range(12)]
    size = sum(map(len, blocks))
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="any") as sdk:
        upload = await sdk.uploads.create(filename="f", purpose="user_data", bytes=size, mime_type="text/plain")
        made = await asyncio.gather(*(sdk.uploads.parts.create(upload.id, data=block) for block in blocks))
        done = await sdk.uploads.complete(upload.id, part_ids=[part.id for part in made])
        assert done.file is not None
        content = await sdk.files.content(done.file.id)

    assert content.content == b"".join(blocks)


def test_completions_at_once_make_one_file(
    base_url: str, app: FastAPI, sdk: OpenAI, stored_files: Callable[[], int]
) -> None:
    upload = sdk.uploads.create(filename="f", purpose="user_data", bytes=1_500_000, mime_type="text/plain")
    part_ids = [sdk.uploads.parts.create(upload.id, data=b"x" * 500_000).id for _ in range(3)]

    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda _: sdk.uploads.complete(upload.id, part_ids=part_ids), range(6)))

    assert len({one.file.id for one in done if one.file}) == 1
    assert all(one.file is not None for one in done)
    assert len(sdk.files.list().data) == 1
    assert stored_files() == 1
    assert app.state.services.completions._locks == {}


async def test_turns_are_taken_one_by_one_for_each_key() -> None:
    turns, inside, most = Turns(), {"a": 0, "b": 0}, {"a": 0, "b": 0}

    async def take(key: str) -> None:
        async with turns.of(key):
            inside[key] += 1
            most[key] = max(most[key], inside[key])
            await asyncio.sleep(0)
            inside[key] -= 1

    await asyncio.gather(*(take(key) for key in "ababab"))
    assert most == {"a": 1, "b": 1}
    held = asyncio.create_task(take("a"))
    held.cancel()
    await asyncio.wait([held])
    assert (turns._locks, turns._users) == ({}, {})


def test_the_bytes_of_a_project_are_limited_here_too(client: TestClient, app: FastAPI) -> None:
    services = app.state.services
    limited = services.settings.model_copy(update={"max_stored_bytes": 12})
    app.state.services = replace(services, settings=limited)
    first, second = Parts(client), Parts(client)
    kept = first.add(b"123456789")

    assert read_error(second.send(b"123456789"), 403)["code"] == "storage_limit_exceeded"
    assert first.complete(kept).status_code == 200
    assert read_error(second.send(b"123456789"), 403)["code"] == "storage_limit_exceeded"
    assert read_error(client.post("/v1/uploads", json=PARAMS), 403)["code"] == "storage_limit_exceeded"
    client.delete(f"/v1/files/{client.get('/v1/files').json()['data'][0]['id']}")
    assert second.complete(second.add(b"123456789")).status_code == 200


def test_an_upload_of_another_project_is_unknown(client: TestClient, app: FastAPI) -> None:
    upload = Parts(client)
    part = upload.add(b"123456789")
    app.dependency_overrides[get_project] = lambda: "another"

    assert upload.send(b"x").status_code == 404
    assert upload.complete(part).status_code == 404
    assert upload.cancel().status_code == 404
    app.dependency_overrides.clear()
    file = upload.complete(part).json()["file"]
    app.dependency_overrides[get_project] = lambda: "another"
    assert upload.complete(part).status_code == 404
    assert client.get(f"/v1/files/{file['id']}").status_code == 404
