"""Numbers 1 to 18 of the checklist: the Files API."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx2
import openai
import pytest

from tests.conformance.envelope import read_error
from tests.conformance.sending import sent_by
from tests.conformance.submissions import Submissions
from tests.target import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DAY = 86_400
CONTENT = b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": "x"}}\n'

File = Mapping[str, Any]
Form = Sequence[tuple[str, tuple[str | None, bytes] | tuple[str | None, str]]]


@pytest.fixture
def create(plain: httpx2.Client) -> Callable[..., File]:
    """Upload with plain HTTP; returns the File object."""

    def create(content: bytes = CONTENT, **fields: str) -> File:
        answer = post_form(plain, [*form(fields), ("file", ("lines.jsonl", content))])
        assert answer.status_code == 200, answer.text
        file: File = answer.json()
        return file

    return create


def form(fields: Mapping[str, str]) -> Form:
    return [(name, (None, value)) for name, value in ({"purpose": "batch"} | fields).items()]


def post_form(plain: httpx2.Client, parts: Form) -> httpx2.Response:
    """Send the parts in their order."""
    return plain.post("files", files=list(parts))


def pages(plain: httpx2.Client, **query: str | int) -> Sequence[Mapping[str, Any]]:
    """Follow `after` to the end."""
    found: list[Mapping[str, Any]] = []
    while not found or found[-1]["has_more"]:
        cursor = {"after": found[-1]["last_id"]} if found else {}
        answer = plain.get("files", params={**query, **cursor})
        assert answer.status_code == 200, answer.text
        found.append(answer.json())
    return found


def test_h001_create(create: Callable[..., File]) -> None:
    file = create()
    assert file["id"].startswith("file-")
    assert (file["object"], file["bytes"], file["purpose"]) == ("file", len(CONTENT), "batch")
    assert type(file["created_at"]) is int
    assert file["filename"] == "lines.jsonl"
    assert file["status"] in ("uploaded", "processed")


def test_h002_the_file_may_come_before_the_purpose(plain: httpx2.Client) -> None:
    answer = post_form(plain, [("file", ("lines.jsonl", CONTENT)), ("purpose", (None, "batch"))])
    assert answer.status_code == 200, answer.text
    assert (answer.json()["bytes"], answer.json()["purpose"]) == (len(CONTENT), "batch")


def test_h003_raw_bytes_of_the_sdk(strict_client: openai.OpenAI) -> None:
    for given in (CONTENT, io.BytesIO(CONTENT)):
        file = strict_client.files.create(file=given, purpose="batch")
        assert (file.filename, file.bytes) == ("upload", len(CONTENT))


def test_h004_expires_after(create: Callable[..., File]) -> None:
    file = create(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    assert file["expires_at"] == file["created_at"] + 3600


def test_h005_expires_after_out_of_range(plain: httpx2.Client) -> None:
    for seconds in ("3599", "2592001"):
        fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}
        read_error(post_form(plain, [*form(fields), ("file", ("a.jsonl", CONTENT))]), 400)


def test_h006_default_expiry(create: Callable[..., File]) -> None:
    file = create()
    assert file["expires_at"] == file["created_at"] + 30 * DAY
    assert create(purpose="user_data").get("expires_at") is None


def test_h007_wrong_forms_are_400(plain: httpx2.Client) -> None:
    part = ("file", ("a.jsonl", CONTENT))
    assert read_error(post_form(plain, [*form({"purpose": "nonsense"}), part]), 400)["param"] == "purpose"
    read_error(post_form(plain, form({})), 400)
    read_error(post_form(plain, [part]), 400)


def test_h008_an_empty_file_is_refused_or_fails_its_batch(submissions: Submissions) -> None:
    refusal = submissions.refusal("empty")
    if refusal is not None:
        assert isinstance(refusal, openai.BadRequestError)
        read_error(refusal.response, 400)
        return
    batch = submissions.finish("empty")
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [error.code for error in batch.errors.data or ()] == ["empty_file"]


def test_h009_a_file_over_the_limit_is_refused_once(target: Target, strict_client: openai.OpenAI) -> None:
    content = bytes(int(target.max_file_bytes) + (2 << 20))
    with sent_by(strict_client) as sent, pytest.raises(openai.APIStatusError) as refusal:
        strict_client.files.create(file=("large.jsonl", content), purpose="batch")
    assert 400 <= refusal.value.status_code < 500
    # The batches are watched with the same client.
    assert len([request for request in sent if request.method == "POST"]) == 1
    read_error(refusal.value.response, refusal.value.status_code)


def test_h010_order_and_filter(plain: httpx2.Client, create: Callable[..., File]) -> None:
    made = [create()["id"] for _ in range(3)]
    other = create(purpose="user_data")["id"]

    def listed(**query: str) -> Sequence[str]:
        return [file["id"] for page in pages(plain, **query) for file in page["data"] if file["id"] in {*made, other}]

    assert listed() == [other, *reversed(made)]
    assert listed(order="asc") == [*made, other]
    assert listed(purpose="batch") == made[::-1]


def test_h011_the_shape_of_a_list(plain: httpx2.Client, create: Callable[..., File]) -> None:
    create()
    for limit in (1, 10_000):
        page = plain.get("files", params={"limit": limit}).json()
        assert page.keys() == {"object", "data", "first_id", "last_id", "has_more"}
        assert page["object"] == "list"
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        assert len(page["data"]) <= limit
    for limit in (0, 10_001):
        assert read_error(plain.get("files", params={"limit": limit}), 400)["param"] == "limit"


def test_h012_paging_visits_every_file_once(plain: httpx2.Client, create: Callable[..., File]) -> None:
    made = {create(purpose="user_data")["id"] for _ in range(3)}
    walked = [file["id"] for page in pages(plain, limit=1, purpose="user_data") for file in page["data"]]
    at_once = [file["id"] for file in plain.get("files", params={"purpose": "user_data"}).json()["data"]]
    assert walked == at_once
    assert made <= set(walked)
    assert len(set(walked)) == len(walked)


def test_h013_retrieve(plain: httpx2.Client, create: Callable[..., File]) -> None:
    file = create()
    assert plain.get(f"files/{file['id']}").json() == file
    error = read_error(plain.get("files/file-unknown"), 404)
    assert (error["param"], error["type"]) == ("id", "invalid_request_error")


def test_h014_content_is_the_bytes(plain: httpx2.Client, create: Callable[..., File]) -> None:
    content = bytes(range(256)) * 50
    file = create(content, purpose="user_data")
    for accept in ("application/binary", "application/json", "*/*"):
        answer = plain.get(f"files/{file['id']}/content", headers={"Accept": accept})
        assert (answer.status_code, answer.content) == (200, content)


def test_h015_delete(plain: httpx2.Client, create: Callable[..., File]) -> None:
    file_id = create()["id"]
    answer = plain.delete(f"files/{file_id}")
    assert (answer.status_code, answer.json()) == (200, {"id": file_id, "object": "file", "deleted": True})
    for path in (f"files/{file_id}", f"files/{file_id}/content"):
        read_error(plain.get(path), 404)


def test_h016_a_file_is_processed_at_once(strict_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    file = strict_client.files.create(file=CONTENT, purpose="batch")
    monkeypatch.setattr(strict_client.files, "_sleep", lambda seconds: pytest.fail("it waited"))
    assert strict_client.files.wait_for_processing(file.id).status == "processed"


def test_h017_strict_mode_sdk_parses_files(strict_client: openai.OpenAI, submissions: Submissions) -> None:
    file = strict_client.files.create(file=CONTENT, purpose="batch")
    assert strict_client.files.retrieve(file.id) == file
    assert file in strict_client.files.list(limit=100).data
    assert strict_client.files.delete(file.id).deleted
    assert strict_client.files.list(purpose="batch_output").object == "list"


def test_h018_an_expired_file_is_gone(target: Target, create: Callable[..., File]) -> None:
    file = create(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    lasting = create()
    headers = {"Authorization": f"Bearer {target.api_key}"}
    with httpx2.Client(base_url=target.need("later_url"), headers=headers, timeout=60) as later:
        for path in (f"files/{file['id']}", f"files/{file['id']}/content"):
            assert read_error(later.get(path), 404)["param"] == "id"
        assert later.get(f"files/{lasting['id']}").json() == lasting
