"""Uploads in parts over HTTP: items 19 to 23 of the contract's checklist, in process."""

import hashlib
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from tests.api.upload_routes import PARAMS, Parts, read_error
from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.uploads import MAX_PART_BYTES

HOUR = 3600


@pytest.fixture
def parts(client: TestClient) -> Callable[..., Parts]:
    return lambda **params: Parts(client, **params)


def test_19_a_new_upload_is_pending_for_an_hour(parts: Callable[..., Parts], clock: FixedClock) -> None:
    upload = parts().created

    assert upload.keys() == {
        "id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "file",
    }  # fmt: skip
    assert upload["id"].startswith("upload_")
    assert (upload["object"], upload["status"], upload["file"]) == ("upload", "pending", None)
    assert (upload["bytes"], upload["filename"], upload["purpose"]) == (9, "in.jsonl", "batch")
    assert upload["created_at"] == int(clock())
    assert upload["expires_at"] == upload["created_at"] + HOUR


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"filename": None}, "filename", "invalid_type"),
        ({"purpose": "batch_output"}, "purpose", "invalid_value"),
        ({"bytes": "9"}, "bytes", "invalid_type"),
        ({"bytes": True}, "bytes", "invalid_type"),
        ({"bytes": -1}, "bytes", "integer_below_min_value"),
        ({"bytes": (8 << 30) + 1}, "bytes", "integer_above_max_value"),
        ({"mime_type": "x" * 513}, "mime_type", "string_above_max_length"),
        (
            {"expires_after": {"anchor": "created_at", "seconds": 3599}},
            "expires_after.seconds",
            "integer_below_min_value",
        ),
    ],
)
def test_19_wrong_parameters_are_refused(client: TestClient, change: dict[str, Any], param: str, code: str) -> None:
    error = read_error(client.post("/v1/uploads", json={**PARAMS, **change}))
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("missing", ["filename", "purpose", "bytes", "mime_type"])
def test_19_missing_parameters_are_refused(client: TestClient, missing: str) -> None:
    error = read_error(client.post("/v1/uploads", json={name: PARAMS[name] for name in PARAMS if name != missing}))
    assert (error["param"], error["code"]) == (missing, "missing_required_parameter")


def test_19_an_upload_over_the_server_s_limit_is_413(client: TestClient) -> None:
    error = read_error(client.post("/v1/uploads", json={**PARAMS, "bytes": (2 << 20) + 1}), 413)
    assert (error["param"], error["code"]) == ("bytes", "file_too_large")


def test_20_a_part_of_64_mib_is_taken_and_one_byte_more_is_not(
    parts: Callable[..., Parts], stored_files: Callable[[], int]
) -> None:
    upload = parts()

    answer = upload.send(bytes(MAX_PART_BYTES))
    assert answer.status_code == 200
    assert answer.json().keys() == {"id", "object", "created_at", "upload_id"}
    assert answer.json()["object"] == "upload.part"
    assert answer.json()["upload_id"] == upload.created["id"]
    assert stored_files() == 1

    error = read_error(upload.send(bytes(MAX_PART_BYTES + 1)), 413)
    assert (error["param"], error["code"]) == ("data", "part_too_large")
    assert stored_files() == 1


def test_20_a_part_that_announces_too_much_is_refused_at_once(base_url: str, parts: Callable[..., Parts]) -> None:
    address = urlsplit(base_url)
    head = (
        f"POST {parts().url}/parts HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        f"Content-Length: {MAX_PART_BYTES + (2 << 20)}\r\nContent-Type: multipart/form-data; boundary=cut\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode())  # nothing of the body is ever sent
        answer = connection.makefile("rb").read()

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"part_too_large"' in answer


def test_20_wrong_forms_are_refused(parts: Callable[..., Parts], stored_files: Callable[[], int]) -> None:
    upload = parts()
    assert read_error(upload.send(b"x", name="file"))["param"] == "data"
    twice = [("data", ("a", b"x")), ("data", ("b", b"y"))]
    assert read_error(upload.client.post(f"{upload.url}/parts", files=twice))["param"] == "data"
    read_error(upload.client.post(f"{upload.url}/parts", json={}), 415)
    assert stored_files() == 0


def test_21_the_order_of_the_completion_is_the_order_of_the_file(
    client: TestClient, parts: Callable[..., Parts], stored_files: Callable[[], int], clock: FixedClock
) -> None:
    upload = parts(expires_after={"anchor": "created_at", "seconds": HOUR})
    third, first, spare, second = (upload.add(data) for data in (b"three", b"one", b"not used", b"2"))
    clock.advance(100)

    answer = upload.complete(first, second, third)

    assert answer.status_code == 200, answer.text
    done = answer.json()
    assert done["status"] == "completed"
    assert done | {"status": "pending", "file": None} == upload.created
    file = done["file"]
    assert (file["bytes"], file["purpose"], file["filename"], file["status"]) == (9, "batch", "in.jsonl", "processed")
    assert file["created_at"] == int(clock())
    assert file["expires_at"] == int(clock()) + HOUR
    assert client.get(f"/v1/files/{file['id']}").json() == file
    assert client.get(f"/v1/files/{file['id']}/content").content == b"one2three"
    assert stored_files() == 1, f"the parts are gone, {spare} included"


def test_21_the_file_has_the_digest_of_its_contents(
    client: TestClient, parts: Callable[..., Parts], store: BatchStore
) -> None:
    blocks = [bytes([number]) * 700_000 for number in range(3)]
    upload = parts(bytes=2_100_000 - 10_000, purpose="user_data")
    part_ids = [upload.add(block) for block in (*blocks[:2], blocks[2][10_000:])]
    whole = b"".join(blocks)[:-10_000]

    file = upload.complete(*part_ids, md5=hashlib.md5(whole).hexdigest()).json()["file"]

    assert store.files.get(file["id"]).sha256 == hashlib.sha256(whole).hexdigest()
    assert file["expires_at"] is None
    assert client.get(f"/v1/files/{file['id']}/content").content == whole


def test_21_nothing_at_all_is_a_file_too(client: TestClient, parts: Callable[..., Parts]) -> None:
    file = parts(bytes=0).complete().json()["file"]
    assert file["bytes"] == 0
    assert client.get(f"/v1/files/{file['id']}/content").content == b""


def test_22_the_total_must_be_what_was_announced(parts: Callable[..., Parts]) -> None:
    upload = parts()
    short, rest = upload.add(b"12345678"), upload.add(b"9")

    error = read_error(upload.complete(short))
    assert (error["param"], error["code"]) == ("part_ids", "bytes_mismatch")
    assert "8 bytes" in error["message"]
    assert upload.complete(short, rest).status_code == 200, "a refused completion may be tried again"


def test_22_the_checksum_must_fit_when_there_is_one(
    client: TestClient, parts: Callable[..., Parts], stored_files: Callable[[], int]
) -> None:
    upload = parts()
    part = upload.add(b"123456789")
    md5 = hashlib.md5(b"123456789").hexdigest()

    error = read_error(upload.complete(part, md5="0" * 32))
    assert (error["param"], error["code"]) == ("md5", "checksum_mismatch")
    assert read_error(upload.complete(part, md5="zz"))["code"] == "invalid_value"
    assert client.get("/v1/files").json()["data"] == []
    assert stored_files() == 1, "the part, and nothing of the attempts"
    assert upload.complete(part, md5=md5.upper()).status_code == 200
    assert read_error(upload.complete(part, md5="0" * 32))["code"] == "checksum_mismatch"
    assert upload.complete(part, md5=None).status_code == 200


@pytest.mark.parametrize(
    ("params", "param", "code"),
    [
        ({}, "part_ids", "missing_required_parameter"),
        ({"part_ids": "part_1"}, "part_ids", "invalid_type"),
        ({"part_ids": [1]}, "part_ids[0]", "invalid_type"),
        ({"part_ids": ["part_1"]}, "part_ids[0]", "invalid_value"),
        ({"part_ids": [], "md5": 5}, "md5", "invalid_type"),
    ],
)
def test_22_wrong_completions_are_refused(
    client: TestClient, parts: Callable[..., Parts], params: dict[str, Any], param: str, code: str
) -> None:
    error = read_error(client.post(f"{parts().url}/complete", json=params))
    assert (error["param"], error["code"]) == (param, code)


def test_22_a_part_counts_once_and_only_for_its_upload(parts: Callable[..., Parts]) -> None:
    upload, other = parts(bytes=4), parts(bytes=4)
    part = upload.add(b"12")

    assert read_error(upload.complete(part, part))["param"] == "part_ids[1]"
    assert read_error(other.complete(part))["param"] == "part_ids[0]"


def test_23_a_cancelled_upload_is_closed(parts: Callable[..., Parts], stored_files: Callable[[], int]) -> None:
    upload = parts()
    part = upload.add(b"123456789")

    cancelled = upload.cancel()
    assert cancelled.status_code == 200
    assert cancelled.json() == upload.created | {"status": "cancelled"}
    assert stored_files() == 0
    assert read_error(upload.send(b"x"))["code"] == "upload_not_pending"
    assert read_error(upload.complete(part))["code"] == "upload_not_pending"
    assert upload.cancel().json()["status"] == "cancelled"


def test_23_a_completed_upload_is_closed(parts: Callable[..., Parts]) -> None:
    upload = parts()
    part = upload.add(b"123456789")
    first = upload.complete(part).json()

    assert read_error(upload.send(b"x"))["code"] == "upload_not_pending"
    assert read_error(upload.cancel())["code"] == "upload_not_pending"
    assert read_error(upload.complete())["code"] == "upload_not_pending"
    assert upload.complete(part).json() == first, "the same completion again gives the same file"


def test_23_an_hour_later_it_is_expired(
    parts: Callable[..., Parts], stored_files: Callable[[], int], clock: FixedClock
) -> None:
    upload = parts()
    part = upload.add(b"123456789")

    clock.advance(HOUR)
    error = read_error(upload.complete(part))
    assert error["code"] == "upload_not_pending"
    assert "expired" in error["message"]
    assert stored_files() == 0
    assert read_error(upload.send(b"x"))["code"] == "upload_not_pending"
    assert read_error(upload.cancel())["code"] == "upload_not_pending"


def test_23_what_became_of_the_file_is_said(client: TestClient, parts: Callable[..., Parts]) -> None:
    upload = parts()
    part = upload.add(b"123456789")
    file = upload.complete(part).json()["file"]
    client.delete(f"/v1/files/{file['id']}")

    assert file["id"] in read_error(upload.complete(part), 404)["message"]


@pytest.mark.parametrize("upload_id", ["upload_0", "%00", "..%2f.."])
def test_23_an_unknown_upload_is_404(client: TestClient, upload_id: str) -> None:
    for step, body in (("parts", {"files": {"data": b"x"}}), ("complete", {"json": {"part_ids": []}}), ("cancel", {})):
        assert client.post(f"/v1/uploads/{upload_id}/{step}", **body).status_code == 404  # type: ignore[arg-type]
