"""Numbers 19 to 24 of the checklist: the Uploads API."""

import hashlib

import httpx2
import openai
import pytest
from openai.types import Upload

from tests.conformance.envelope import read_error
from tests.conformance.submissions import Submissions, read_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LARGEST_PART = 67_108_864
PARTS = (b"first " * 100, b"second " * 100, b"third " * 100)
WHOLE = b"".join(PARTS)


def begin(client: openai.OpenAI, size: int = len(WHOLE)) -> Upload:
    return client.uploads.create(filename="a.jsonl", purpose="batch", bytes=size, mime_type="application/jsonl")


def send_all(client: openai.OpenAI, size: int = len(WHOLE)) -> tuple[str, list[str]]:
    """Return the upload and its parts."""
    upload = begin(client, size)
    return upload.id, [client.uploads.parts.create(upload.id, data=part).id for part in PARTS]


def complete(plain: httpx2.Client, upload_id: str, part_ids: list[str], **parameters: str) -> httpx2.Response:
    return plain.post(f"uploads/{upload_id}/complete", json={"part_ids": part_ids, **parameters})


def test_h019_create(strict_client: openai.OpenAI) -> None:
    upload = begin(strict_client)
    assert upload.id.startswith("upload_")
    assert (upload.status, upload.object, upload.bytes) == ("pending", "upload", len(WHOLE))
    assert (upload.filename, upload.purpose, upload.file) == ("a.jsonl", "batch", None)
    assert upload.expires_at == upload.created_at + 3600


def test_h020_the_largest_part(strict_client: openai.OpenAI, plain: httpx2.Client) -> None:
    upload = begin(strict_client, LARGEST_PART)
    part = strict_client.uploads.parts.create(upload.id, data=bytes(LARGEST_PART))
    assert (part.object, part.upload_id) == ("upload.part", upload.id)
    assert part.id.startswith("part_")
    answer = plain.post(f"uploads/{upload.id}/parts", files={"data": bytes(LARGEST_PART + 1)})
    read_error(answer, 400, 413)
    strict_client.uploads.cancel(upload.id)


def test_h021_complete_takes_the_order_of_part_ids(strict_client: openai.OpenAI) -> None:
    upload = begin(strict_client)
    sent = {part: strict_client.uploads.parts.create(upload.id, data=part).id for part in reversed(PARTS)}
    completed = strict_client.uploads.complete(upload.id, part_ids=[sent[part] for part in PARTS])
    assert completed.status == "completed"
    assert completed.file is not None
    assert (completed.file.bytes, completed.file.filename, completed.file.purpose) == (len(WHOLE), "a.jsonl", "batch")
    assert strict_client.files.content(completed.file.id).content == WHOLE
    assert strict_client.files.retrieve(completed.file.id) == completed.file


def test_h022_bytes_and_md5_must_be_right(strict_client: openai.OpenAI, plain: httpx2.Client) -> None:
    for size in (len(WHOLE) - 1, len(WHOLE) + 1):
        read_error(complete(plain, *send_all(strict_client, size)), 400)
    upload_id, parts = send_all(strict_client)
    read_error(complete(plain, upload_id, parts, md5=hashlib.md5(b"another").hexdigest()), 400)
    upload_id, parts = send_all(strict_client)
    answer = complete(plain, upload_id, parts, md5=hashlib.md5(WHOLE).hexdigest())
    assert (answer.status_code, answer.json()["status"]) == (200, "completed")


def test_h023_nothing_comes_after_the_end(strict_client: openai.OpenAI, plain: httpx2.Client) -> None:
    completed, parts = send_all(strict_client)
    strict_client.uploads.complete(completed, part_ids=parts)
    cancelled = begin(strict_client).id
    assert strict_client.uploads.cancel(cancelled).status == "cancelled"
    for upload_id in (completed, cancelled):
        answer = plain.post(f"uploads/{upload_id}/parts", files={"data": b"more"})
        assert 400 <= answer.status_code < 500
        read_error(answer, answer.status_code)


def test_h024_a_batch_of_a_file_in_parts(strict_client: openai.OpenAI, submissions: Submissions) -> None:
    batch = submissions.finish("in_parts")
    assert batch.status == "completed"
    assert len(read_lines(strict_client, batch.output_file_id)) == len(submissions["in_parts"].lines)
