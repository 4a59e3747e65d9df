"""Uploads on a real server that is killed, cut off or out of disk: nothing partial is seen, and the retry works."""

import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from tests.faults.conftest import ApiProcess
from vllm_batch_dagster.composition import sweep_files
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages.uploads import JOIN_BLOCK_BYTES

pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20
DISK_MIB = 16
Send = Callable[[httpx2.Client, bytes], httpx2.Response]


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until true. Fails after two minutes."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"it never happened: {what}"
        time.sleep(0.001)


def drafts(api: ApiProcess) -> int:
    """Bytes on disk of what is still arriving."""
    folder, size = api.files / ".tmp", 0
    for path in folder.iterdir() if folder.exists() else ():
        with suppress(FileNotFoundError):  # the server removes it just now
            size += path.stat().st_size
    return size


def send_file(client: httpx2.Client, content: bytes) -> httpx2.Response:
    return client.post("/files", data={"purpose": "user_data"}, files={"file": ("f", content)})


def begin(client: httpx2.Client, size: int) -> str:
    params = {"filename": "f", "purpose": "user_data", "bytes": size, "mime_type": "text/plain"}
    return str(client.post("/uploads", json=params).raise_for_status().json()["id"])


def add_part(client: httpx2.Client, upload_id: str, content: bytes) -> str:
    answer = client.post(f"/uploads/{upload_id}/parts", files={"data": content}).raise_for_status()
    return str(answer.json()["id"])


def complete(client: httpx2.Client, upload_id: str, part_ids: list[str], content: bytes) -> httpx2.Response:
    params = {"part_ids": part_ids, "md5": hashlib.md5(content).hexdigest()}
    return client.post(f"/uploads/{upload_id}/complete", json=params)


def check_file(client: httpx2.Client, file: dict[str, Any], content: bytes) -> None:
    """It is the only file, and it is whole."""
    assert file["bytes"] == len(content)
    assert [listed["id"] for listed in client.get("/files").json()["data"]] == [file["id"]]
    assert client.get(f"/files/{file['id']}/content").content == content


def blocks(number: int, size: int) -> list[bytes]:
    return [hashlib.shake_128(bytes([index])).digest(size) for index in range(number)]


@pytest.mark.parametrize("path", ["/v1/files", "/v1/uploads/{id}/parts"])
@pytest.mark.parametrize("fault", ["the client goes", "the server is killed"])
def test_an_upload_that_is_cut_leaves_nothing_and_the_retry_succeeds(api: ApiProcess, path: str, fault: str) -> None:
    content = b"x" * (3 * MIB)
    with api.client() as client:
        upload_id = begin(client, len(content))
        name = "data" if "parts" in path else "file"
        form = (
            b'--cut\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--cut\r\n'
            b'Content-Disposition: form-data; name="%s"; filename="f"\r\n\r\n' % name.encode()
        )
        head = (
            f"POST {path.format(id=upload_id)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(form) + len(content) + 20}"
            "\r\nContent-Type: multipart/form-data; boundary=cut\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", api.port)) as connection:
            connection.sendall(head.encode() + form + content[: 2 * MIB])
            wait_for(lambda: drafts(api) > 0, "half of it on the disk")
            if fault == "the server is killed":
                api.kill()
        if fault == "the server is killed":
            api.start()
        else:
            wait_for(lambda: drafts(api) == 0, "the draft removed")

        assert api.visible() == []
        assert client.get("/files").json()["data"] == []
        part_id = add_part(client, upload_id, content)
        file = complete(client, upload_id, [part_id], content).raise_for_status().json()["file"]
        check_file(client, file, content)


def test_parts_that_were_acknowledged_outlive_the_server(api: ApiProcess) -> None:
    parts = blocks(3, MIB)
    with api.client() as client:
        upload_id = begin(client, 3 * MIB)
        part_ids = []
        for part in parts:
            part_ids.append(add_part(client, upload_id, part))
            api.restart()
        file = complete(client, upload_id, part_ids, b"".join(parts)).raise_for_status().json()["file"]
        check_file(client, file, b"".join(parts))


@pytest.mark.parametrize("reached", [1, 40 * MIB, 100 * MIB])
def test_a_completion_that_is_killed_in_the_middle_is_done_again(api: ApiProcess, reached: int) -> None:
    parts = blocks(3, 40 * MIB)
    content = b"".join(parts)
    with api.client() as client:
        upload_id = begin(client, len(content))
        part_ids = [add_part(client, upload_id, part) for part in parts]
        # It stands still there until it is killed: nobody is fast enough to hit one that goes on. The last block that
        # was written may still be in a buffer.
        point = api.points / f"joining.{upload_id}"
        point.write_text(f"hold {reached // JOIN_BLOCK_BYTES + 2} 600")
        lost: list[Exception] = []

        def complete_and_lose() -> None:
            try:
                with api.client() as other:
                    complete(other, upload_id, part_ids, content)
            except httpx2.TransportError as failure:
                lost.append(failure)

        call = threading.Thread(target=complete_and_lose)
        call.start()
        wait_for(point.with_name(f"{point.name}.hit").exists, "the file half written")
        assert reached <= drafts(api) < len(content)
        api.kill()
        call.join()
        assert len(lost) == 1, "the kill came too late: the completion was answered"

        api.start()
        assert client.get("/files").json()["data"] == []
        assert len(list((api.files / ".parts").iterdir())) == 3
        file = complete(client, upload_id, part_ids, content).raise_for_status().json()["file"]
        check_file(client, file, content)
        assert complete(client, upload_id, part_ids, content).json()["file"] == file

    assert api.visible() == [file["id"]]
    api.kill()
    sweep_files(Settings(vllm_batch_home=api.home))  # as a start of the stack does
    assert [path for path in api.files.rglob("*") if path.is_file()] == [api.files / file["id"]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of the file store on a file system of 16 MiB; the database stays where there is room."""
    if os.geteuid() != 0:
        pytest.skip("a small file system can only be mounted by root")
    folder = tmp_path / "home" / "files"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"root may not mount a tmpfs here (a container without CAP_SYS_ADMIN?): {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def full_api(small_disk: Path, api: ApiProcess) -> Iterator[ApiProcess]:
    yield api
    api.kill()  # before the disk is taken away


def refuse(answer: httpx2.Response) -> None:
    assert answer.status_code == 507, answer.text
    assert answer.json()["error"]["code"] == "insufficient_storage"
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("size", [DISK_MIB * MIB + 1, 2 * DISK_MIB * MIB])
def test_a_file_on_a_full_disk_is_507_and_the_retry_succeeds(full_api: ApiProcess, size: int) -> None:
    content = b"y" * (10 * MIB)
    with full_api.client() as client:
        refuse(send_file(client, bytes(size)))
        assert [path for path in full_api.files.rglob("*") if path.is_file()] == []
        assert client.get("/files").json()["data"] == []

        file = send_file(client, content).raise_for_status().json()
        check_file(client, file, content)
        refuse(send_file(client, content))
        check_file(client, file, content)


def test_a_part_on_a_full_disk_is_507_and_the_retry_succeeds(full_api: ApiProcess) -> None:
    with full_api.client() as client:
        filler = send_file(client, bytes(12 * MIB)).raise_for_status().json()["id"]
        upload_id = begin(client, 6 * MIB)
        refuse(client.post(f"/uploads/{upload_id}/parts", files={"data": bytes(6 * MIB)}))
        assert full_api.visible() == [filler]
        assert not list((full_api.files / ".parts").iterdir())

        client.delete(f"/files/{filler}").raise_for_status()
        part_id = add_part(client, upload_id, bytes(6 * MIB))
        file = complete(client, upload_id, [part_id], bytes(6 * MIB)).raise_for_status().json()["file"]
        check_file(client, file, bytes(6 * MIB))


def test_a_completion_on_a_full_disk_is_507_and_the_retry_succeeds(full_api: ApiProcess) -> None:
    parts = blocks(2, 3 * MIB)
    with full_api.client() as client:
        filler = send_file(client, bytes(7 * MIB)).raise_for_status().json()["id"]
        upload_id = begin(client, 6 * MIB)
        part_ids = [add_part(client, upload_id, part) for part in parts]

        refuse(complete(client, upload_id, part_ids, b"".join(parts)))
        assert full_api.visible() == [filler]
        assert [listed["id"] for listed in client.get("/files").json()["data"]] == [filler]

        client.delete(f"/files/{filler}").raise_for_status()
        file = complete(client, upload_id, part_ids, b"".join(parts)).raise_for_status().json()["file"]
        check_file(client, file, b"".join(parts))


def test_the_official_client_carries_on_behind_a_restart(api: ApiProcess, tmp_path: Path) -> None:
    """Its own retries bridge a server that is away for a moment, and a completion repeated makes no second file."""
    path = tmp_path / "in.bin"
    path.write_bytes(b"".join(blocks(4, MIB)))
    with OpenAI(base_url=api.url, api_key="any", max_retries=20) as sdk:
        sent = 0

        def kill_once(request: httpx2.Request) -> None:
            nonlocal sent
            if request.url.path.endswith("/parts"):
                sent += 1
                if sent == 3:
                    api.kill()
                    threading.Timer(0.1, api.start).start()

        sdk._client.event_hooks = {"request": [kill_once]}
        upload = sdk.uploads.upload_file_chunked(file=path, mime_type="text/plain", purpose="user_data", part_size=MIB)
        assert upload.file is not None
        assert sdk.files.content(upload.file.id).content == path.read_bytes()
        assert len(sdk.files.list().data) == 1
    assert sent > 4
