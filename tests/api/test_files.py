"""Files over HTTP: items 1 to 9 and 13 to 18 of the contract's checklist, in process."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus

Upload = Callable[..., dict[str, Any]]
FILE_KEYS = {
    "id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details",
}  # fmt: skip
DAY = 86_400
LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "tiny", "input": "hi"}}\n'


def raw_form(*parts: tuple[str, bytes]) -> dict[str, Any]:
    """A multipart request whose parts come in exactly this order. A header line is part of the first item."""
    body = b"".join(b"--cut\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts)
    return {"content": body + b"--cut--\r\n", "headers": {"content-type": "multipart/form-data; boundary=cut"}}


PURPOSE = ('Content-Disposition: form-data; name="purpose"', b"batch")
FILE = ('Content-Disposition: form-data; name="file"; filename="in.jsonl"', LINE)


def test_01_upload_gives_a_file_object(upload: Upload, clock: FixedClock) -> None:
    file = upload(LINE)

    assert file.keys() == FILE_KEYS
    assert file["id"].startswith("file-")
    assert len(file["id"]) >= len("file-") + 24
    assert file["object"] == "file"
    assert file["bytes"] == len(LINE)
    assert file["created_at"] == int(clock())
    assert (file["filename"], file["purpose"], file["status"]) == ("in.jsonl", "batch", "processed")


@pytest.mark.parametrize("parts", [(PURPOSE, FILE), (FILE, PURPOSE)], ids=["purpose first", "file first"])
def test_02_parts_come_in_any_order(client: TestClient, parts: tuple[tuple[str, bytes], ...]) -> None:
    answer = client.post("/v1/files", **raw_form(*parts))

    assert answer.status_code == 200
    assert client.get(f"/v1/files/{answer.json()['id']}/content").content == LINE


def test_03_name_and_type_of_the_part_do_not_matter(client: TestClient) -> None:
    part = ("upload", LINE, "application/octet-stream")
    answer = client.post("/v1/files", data={"purpose": "batch"}, files={"file": part})

    assert answer.json()["filename"] == "upload"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("../../etc/passwd", "passwd"), ("C:\\data\\in.jsonl", "in.jsonl"), ("Zürich 日本.jsonl", "Zürich 日本.jsonl")],
)
def test_03_only_the_last_part_of_a_path_is_kept(client: TestClient, sent: str, kept: str) -> None:
    head = f'Content-Disposition: form-data; name="file"; filename="{sent}"'
    answer = client.post("/v1/files", **raw_form(PURPOSE, (head, LINE)))

    assert answer.json()["filename"] == kept


def test_03_a_file_part_without_a_name_is_called_upload(client: TestClient) -> None:
    head = 'Content-Disposition: form-data; name="file"'
    assert client.post("/v1/files", **raw_form(PURPOSE, (head, LINE))).json()["filename"] == "upload"


@pytest.mark.parametrize("seconds", [3600, 30 * DAY])
def test_04_expires_after_counts_from_the_creation(upload: Upload, seconds: int) -> None:
    file = upload(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": str(seconds)})

    assert file["expires_at"] == file["created_at"] + seconds


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"anchor": "created_at", "seconds": "3599"}, "expires_after.seconds", "integer_below_min_value"),
        ({"anchor": "created_at", "seconds": "2592001"}, "expires_after.seconds", "integer_above_max_value"),
        ({"anchor": "created_at", "seconds": "1h"}, "expires_after.seconds", "invalid_type"),
        ({"anchor": "created_at", "seconds": "9" * 5000}, "expires_after.seconds", "invalid_type"),
        ({"anchor": "created_at"}, "expires_after.seconds", "missing_required_parameter"),
        ({"seconds": "3600"}, "expires_after.anchor", "missing_required_parameter"),
        ({"anchor": "now", "seconds": "3600"}, "expires_after.anchor", "invalid_value"),
    ],
)
def test_05_wrong_expiry_is_refused(
    client: TestClient, stored_files: Callable[[], int], fields: dict[str, str], param: str, code: str
) -> None:
    form = {"purpose": "batch", **{f"expires_after[{name}]": text for name, text in fields.items()}}
    answer = client.post("/v1/files", data=form, files={"file": ("in.jsonl", LINE)})

    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)
    assert stored_files() == 0


def test_06_batch_files_expire_after_thirty_days_and_others_never(upload: Upload) -> None:
    file = upload()

    assert file["expires_at"] == file["created_at"] + 2_592_000
    assert upload(purpose="user_data")["expires_at"] is None


@pytest.mark.parametrize(
    ("parts", "param", "code"),
    [
        ((PURPOSE,), "file", "missing_required_parameter"),
        ((FILE,), "purpose", "missing_required_parameter"),
        ((FILE, (PURPOSE[0], b"batch_output")), "purpose", "invalid_value"),
        (((PURPOSE[0], b"nonsense"), FILE), "purpose", "invalid_value"),
        ((PURPOSE, FILE, FILE), "file", None),
    ],
)
def test_07_wrong_forms_are_refused(
    client: TestClient,
    stored_files: Callable[[], int],
    parts: tuple[tuple[str, bytes], ...],
    param: str,
    code: str | None,
) -> None:
    answer = client.post("/v1/files", **raw_form(*parts))

    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)
    assert stored_files() == 0
    assert client.get("/v1/files").json()["data"] == []


def test_08_an_empty_file_is_accepted_here(client: TestClient, upload: Upload) -> None:
    file = upload(b"")

    assert file["bytes"] == 0
    answer = client.get(f"/v1/files/{file['id']}/content")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("excess", [1, 3 << 20], ids=["found while reading", "announced"])
def test_09_a_file_over_the_limit_is_413_and_leaves_nothing(
    client: TestClient, stored_files: Callable[[], int], excess: int
) -> None:
    content = b"x" * ((2 << 20) + excess)
    answer = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})

    assert answer.status_code == 413
    assert answer.json()["error"]["param"] == "file"
    assert answer.json()["error"]["code"] == "file_too_large"
    assert stored_files() == 0


def test_09_a_file_of_exactly_the_limit_is_taken(upload: Upload) -> None:
    assert upload(b"x" * (2 << 20))["bytes"] == 2 << 20


def test_13_retrieve_equals_create_and_unknown_is_404(client: TestClient, upload: Upload) -> None:
    file = upload()
    assert client.get(f"/v1/files/{file['id']}").json() == file

    for path in ("/v1/files/file-0", "/v1/files/file-0/content", "/v1/files/%00"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == "id"
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "No such File object: file-0" in client.get("/v1/files/file-0").json()["error"]["message"]


@pytest.mark.parametrize("accept", ["application/binary", "application/json", "*/*"])
def test_14_content_is_the_bytes_that_were_sent(client: TestClient, upload: Upload, accept: str) -> None:
    content = bytes(range(256)) * 2048 + b"\r\n--cut\r\n"
    file = upload(content)
    plain = {"accept": accept, "accept-encoding": "identity"}
    answer = client.get(f"/v1/files/{file['id']}/content", headers=plain)

    assert answer.content == content
    assert answer.headers["content-length"] == str(len(content))


def test_15_a_deleted_file_is_gone(client: TestClient, upload: Upload, stored_files: Callable[[], int]) -> None:
    file = upload()

    answer = client.delete(f"/v1/files/{file['id']}")
    assert answer.json() == {"id": file["id"], "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{file['id']}").status_code == 404
    assert client.get(f"/v1/files/{file['id']}/content").status_code == 404
    assert client.delete(f"/v1/files/{file['id']}").status_code == 404
    assert client.get("/v1/files").json()["data"] == []
    assert stored_files() == 0


def test_15_the_input_of_an_open_batch_stays(
    client: TestClient, upload: Upload, store: BatchStore, clock: FixedClock
) -> None:
    file = upload(LINE)
    now = int(clock())
    batch = Batch("batch_1", file["id"], "/v1/embeddings", "24h", BatchStatus.VALIDATING, now, now + DAY)
    store.batches.add(batch)

    answer = client.delete(f"/v1/files/{file['id']}")
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert "batch_1" in answer.json()["error"]["message"]
    assert client.get(f"/v1/files/{file['id']}/content").content == LINE

    store.batches.advance("batch_1", BatchEvent.INVALID, now)
    assert client.delete(f"/v1/files/{file['id']}").status_code == 200


def test_18_an_expired_file_is_404_and_not_listed(client: TestClient, upload: Upload, clock: FixedClock) -> None:
    brief = upload(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    lasting = upload()

    clock.advance(3599)
    assert client.get(f"/v1/files/{brief['id']}").status_code == 200
    clock.advance(1)
    for path in (f"/v1/files/{brief['id']}", f"/v1/files/{brief['id']}/content"):
        assert client.get(path).status_code == 404
    assert client.get("/v1/files").json()["data"] == [lasting]
