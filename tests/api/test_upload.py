"""The streaming upload under bad weather: any cut of the body, broken bodies, clients that vanish, full disks."""

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api_shim.multipart import MAX_FIELD_BYTES, MAX_FIELDS, UploadForm
from tests.api.conftest import PATIENCE_SECONDS
from vllm_batch_dagster.core.errors import InvalidInput, StorageFailure
from vllm_batch_dagster.core.ports import StoredFile

# Pieces of the boundary, so that near misses are common; whole ones are the sender's mistake (RFC 2046, 5.1.1).
PIECES = [b"\r", b"\n", b"-", b"--", b"\r\n", b"\r\n-", b"\r\n--", b"\r\n--cu", b"--cut", b"cut", b"x", b"\0"]
NEARLY_BOUNDARY = st.lists(st.sampled_from(PIECES)).map(b"".join).filter(lambda data: b"\r\n--cut" not in data)


def make_body(content: bytes, *, file_first: bool) -> bytes:
    purpose = b'--cut\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    file = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + content + b"\r\n"
    return (file + purpose if file_first else purpose + file) + b"--cut--\r\n"


class Collected:
    """A sink in memory."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


@given(content=NEARLY_BOUNDARY, cuts=st.lists(st.integers(0, 300)), file_first=st.booleans())
def test_any_cut_of_any_content_arrives_unchanged(content: bytes, cuts: list[int], file_first: bool) -> None:
    body = make_body(content, file_first=file_first)
    sink = Collected()
    form = UploadForm(b"cut", lambda: sink)

    for start, end in zip(marks := [0, *sorted(cuts)], [*marks[1:], len(body)], strict=True):
        form.feed(body[start:end])
    form.close()

    assert sink.data == content
    assert form.fields == {"purpose": "batch"}
    assert form.filename == "f"


@pytest.mark.parametrize("file_first", [True, False])
@pytest.mark.parametrize("ending", [b"", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_blocks_that_are_shorter_than_a_delimiter_hide_none(size: int, ending: bytes, file_first: bool) -> None:
    body = make_body(b"con\r\n--cu\rtent", file_first=file_first).removesuffix(b"\r\n") + ending
    sink = Collected()
    for first in range(1, size + 1):
        sink.data = b""
        form = UploadForm(b"cut", lambda: sink)
        form.feed(body[:first])
        for start in range(first, len(body), size):
            form.feed(body[start : start + size])
            form.feed(b"")
        form.close()
        assert (sink.data, form.fields) == (b"con\r\n--cu\rtent", {"purpose": "batch"})


@given(kept=st.integers(0, len(make_body(b"content", file_first=False)) - len("--\r\n") - 1))
def test_a_body_that_stops_early_is_never_a_file(kept: int) -> None:
    form = UploadForm(b"cut", Collected)
    form.feed(make_body(b"content", file_first=False)[:kept])

    with pytest.raises(InvalidInput, match="closing boundary"):
        form.close()


@pytest.mark.parametrize(
    "body",
    [
        b"not multipart at all",
        b"--other\r\n\r\n",
        b'--cut\r\nContent-Disposition: form-data; filename="f"\r\n\r\nx\r\n--cut--\r\n',
        b"--cut\r\nbad header\r\n\r\nx\r\n--cut--\r\n",
        b'--cut\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch',
        b'--cut\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * (MAX_FIELD_BYTES + 1),
        b'--cut\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * (MAX_FIELDS + 2) + b"--cut--\r\n",
        b"",
    ],
)
def test_a_broken_body_is_400(client: TestClient, stored_files: Callable[[], int], body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=cut"}
    answer = client.post("/v1/files", content=body, headers=headers)

    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert stored_files() == 0


@pytest.mark.parametrize(
    ("content_type", "status"),
    [("application/json", 415), ("multipart/form-data", 400), ("multipart/form-data; boundary=" + "x" * 300, 400)],
)
def test_a_body_that_is_not_a_form_is_refused(client: TestClient, content_type: str, status: int) -> None:
    answer = client.post("/v1/files", content=b"{}", headers={"content-type": content_type})

    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def open_upload(base_url: str, announced: int, sent: bytes) -> socket.socket:
    """Start an upload on a bare socket: announce a length, send less."""
    address = urlsplit(base_url)
    connection = socket.create_connection((address.hostname, address.port))
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {announced}\r\n"
        "Content-Type: multipart/form-data; boundary=cut\r\n\r\n"
    )
    connection.sendall(head.encode() + sent)
    return connection


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch, app: FastAPI) -> Iterator[None]:
    """A file store whose disk is full at the first byte, as its adapter reports it."""
    create = app.state.services.files.create

    def create_on_full_disk(file_id: str) -> StoredFile:
        stored: StoredFile = create(file_id)

        def write(data: bytes) -> None:
            raise StorageFailure("cannot write") from OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(stored, "write", write)
        return stored

    with monkeypatch.context() as patch:
        patch.setattr(app.state.services.files, "create", create_on_full_disk)
        yield


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_507_and_leaves_nothing(client: TestClient, stored_files: Callable[[], int]) -> None:
    answer = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("f", b"content")})

    assert answer.status_code == 507
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.json()["error"]["code"] == "insufficient_storage"
    assert answer.headers["x-should-retry"] == "false"
    assert stored_files() == 0


def test_a_record_that_cannot_be_written_leaves_no_contents(
    client: TestClient, app: FastAPI, stored_files: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, **_: object) -> None:
        raise StorageFailure("the database is read-only")

    monkeypatch.setattr(app.state.services.store.files, "add", refuse)
    answer = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("f", b"content")})

    assert answer.status_code == 500
    assert "read-only" in answer.json()["error"]["message"]
    assert stored_files() == 0


def test_other_requests_are_served_while_uploads_hang(base_url: str) -> None:
    with ExitStack() as stack:
        for _ in range(50):  # more than there are threads for uploads, or for routes
            stack.enter_context(open_upload(base_url, 1_000_000, make_body(b"x" * 1000, file_first=True)[:500]))
        client = stack.enter_context(httpx2.Client(base_url=base_url, timeout=PATIENCE_SECONDS))
        assert client.get("/health").status_code == 200
        file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("f", b"x")}).json()
        assert client.get(f"/v1/files/{file['id']}/content").content == b"x"
