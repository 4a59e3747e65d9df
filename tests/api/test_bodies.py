"""Large bodies are read past uvicorn: they arrive unchanged, and the connection goes on whatever became of them."""

import hashlib
import socket
from collections.abc import Callable
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI

from api_shim.bodies import BLOCK_BYTES, _Filling
from api_shim.protocol import SocketDoor
from tests.api.conftest import PATIENCE_SECONDS, wait_for
from vllm_batch_dagster.settings import Settings

MEBIBYTE = 1 << 20
SIZES = [BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 1, 9 * MEBIBYTE + 7]


def make_form(content: bytes, purpose: bytes = b"batch") -> bytes:
    return (
        b'--cut\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose + b"\r\n"
        b'--cut\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + content + b"\r\n--cut--\r\n"
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(vllm_batch_home=tmp_path / "home", postgres_host="", max_file_bytes=0)


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were left of each body when a socket was read directly."""
    opened: list[int] = []
    open_door = SocketDoor.open

    def note(door: SocketDoor, left: int) -> bytes:
        opened.append(left)
        return open_door(door, left)

    monkeypatch.setattr(SocketDoor, "open", note)
    return opened


@pytest.fixture
def connection(base_url: str) -> HTTPConnection:
    return HTTPConnection(urlsplit(base_url).netloc, timeout=PATIENCE_SECONDS)


def post(connection: HTTPConnection, body: bytes) -> tuple[HTTPResponse, bytes]:
    connection.request("POST", "/v1/files", body, {"content-type": "multipart/form-data; boundary=cut"})
    answer = connection.getresponse()
    return answer, answer.read()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alphabet", [b"ab\n", b"a\r\n", b"\r\n-"], ids=["plain", "with CR", "nearly delimiters"])
def test_contents_arrive_unchanged_on_one_connection(
    connection: HTTPConnection, app: FastAPI, doors: list[int], size: int, alphabet: bytes
) -> None:
    content = bytes(Random(size).choices(alphabet, k=size))
    for _ in range(2):
        answer, text = post(connection, make_form(content))
        assert answer.status == 200, text
        assert connection.sock is not None, "the server closed a connection that it could have kept"
    files = app.state.services.store.files.list(purpose=None, after=None, limit=10, order="asc").data
    assert [file.sha256 for file in files] == [hashlib.sha256(content).hexdigest()] * 2
    assert len(doors) == (2 if size > 2 * BLOCK_BYTES else 0)


def test_a_refused_body_is_read_to_its_end_and_the_connection_goes_on(
    connection: HTTPConnection, doors: list[int], stored_files: Callable[[], int]
) -> None:
    body = make_form(bytes(12 * MEBIBYTE)).replace(b"--cut--\r\n", b"--cut\r\n" + bytes(12 * MEBIBYTE))
    answer, text = post(connection, body)
    assert (answer.status, stored_files()) == (400, 0), text
    assert doors

    answer, text = post(connection, make_form(b"{}\n"))
    assert answer.status == 200, text


def test_a_client_that_vanishes_leaves_nothing(base_url: str, stored_files: Callable[[], int]) -> None:
    where, body = urlsplit(base_url), make_form(b"x" * 5_000_000)
    with socket.create_connection((where.hostname or "", where.port or 0)) as peer:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
        peer.sendall(head + b"Content-Type: multipart/form-data; boundary=cut\r\n\r\n" + body[:4_500_000])
        wait_for(lambda: stored_files() == 1)

    wait_for(lambda: stored_files() == 0)


def test_a_request_in_the_same_packet_as_the_end_of_a_body_is_answered(base_url: str, doors: list[int]) -> None:
    where = urlsplit(base_url)
    body = make_form(b"x" * (7 * MEBIBYTE))
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
    head += b"Content-Type: multipart/form-data; boundary=cut\r\n\r\n"
    after = b"GET /v1/batches?limit=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=PATIENCE_SECONDS) as peer:
        peer.sendall(head + body + after)
        received = b"".join(iter(lambda: peer.recv(65536), b""))
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert doors


def test_a_body_without_a_length_takes_the_ordinary_way(connection: HTTPConnection, doors: list[int]) -> None:
    body = make_form(b"x" * (6 * MEBIBYTE))
    pieces = (body[start : start + 100_000] for start in range(0, len(body), 100_000))
    headers = {"content-type": "multipart/form-data; boundary=cut"}
    connection.request("POST", "/v1/files", pieces, headers, encode_chunked=True)
    answer = connection.getresponse()
    assert (answer.status, doors) == (200, []), answer.read()


@pytest.mark.parametrize("lengths", [[3], [10], [4, 4, 4], [25], [7, 0, 30]])
def test_blocks_hold_until_the_one_after_the_next(lengths: list[int]) -> None:
    filling, sent, got = _Filling(10), b"", b""
    for number, length in enumerate(lengths):
        data = bytes([number + 1]) * length
        sent += data
        for block in filling.put(data):
            assert len(block) == 10
            got += block
    assert got + filling.flush() == sent
