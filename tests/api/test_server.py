"""`python -m api_shim` as a process of its own: where it binds, how it ends, and how much memory an upload takes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest
import yaml

from api_shim.server import bind_listener, is_loopback, serve
from tests.api.conftest import PATIENCE_SECONDS, wait_for
from tests.ports import hold_ports
from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.settings import Settings

MIB = 1 << 20
ALLOWED_GROWTH = 50 * MIB
PROJECT = Path(__file__).parents[2]


@dataclass
class ServerProcess:
    """A running `python -m api_shim` and the address that it said it listens on."""

    process: subprocess.Popen[str]
    url: str

    @property
    def memory(self) -> int:
        """Highest resident size so far, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return int(psutil.Process(self.process.pid).memory_info().rss)
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    catalogue = tmp_path / "models.yaml"
    catalogue.write_text(yaml.safe_dump({"models": [{"name": "tiny", "path": "models/tiny"}]}))
    with hold_ports(1) as (port,):
        yield os.environ | {
            "VLLM_BATCH_HOME": str(tmp_path / "home"),
            "MODELS_FILE": str(catalogue),
            "POSTGRES_HOST": "",
            "API_HOST": "127.0.0.1",
            "API_PORT": str(port),
            "LOG_FORMAT": "json",
            "MAX_FILE_BYTES": "0",
        }


@pytest.fixture
def server(environment: dict[str, str]) -> Iterator[ServerProcess]:
    process = start(environment)
    assert process.stderr is not None
    for line in process.stderr:
        if "listening" in line:
            break
    else:
        pytest.fail("the server ended before it listened")
    yield ServerProcess(process, f"http://127.0.0.1:{environment['API_PORT']}")
    process.kill()
    process.communicate()


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "api_shim"]
    return subprocess.Popen(command, env=environment, cwd=PROJECT, stderr=subprocess.PIPE, text=True)


def get(url: str) -> httpx2.Response:
    return httpx2.get(url, timeout=PATIENCE_SECONDS)


def form_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    yield b'--cut\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    yield b'--cut\r\nContent-Disposition: form-data; name="file"; filename="big.jsonl"\r\n\r\n'
    yield from blocks
    yield b"\r\n--cut--\r\n"


def upload(url: str, mebibytes: int) -> dict[str, object]:
    block = (b"x" * 1023 + b"\n") * 1024
    answer = httpx2.post(
        f"{url}/v1/files",
        content=form_of(block for _ in range(mebibytes)),
        headers={"content-type": "multipart/form-data; boundary=cut"},
        timeout=PATIENCE_SECONDS,
    )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_memory_does_not_grow_with_the_file(server: ServerProcess) -> None:
    small = upload(server.url, 1)
    assert get(f"{server.url}/v1/files/{small['id']}/content").status_code == 200
    before = server.memory

    file = upload(server.url, 200)
    for coding in ("identity", "zstd", "gzip"):
        received, headers = 0, {"accept-encoding": coding}
        url = f"{server.url}/v1/files/{file['id']}/content"
        with httpx2.stream("GET", url, headers=headers, timeout=PATIENCE_SECONDS) as answer:
            for data in answer.iter_bytes():
                received += len(data)
        assert file["bytes"] == received == 200 * MIB

    assert server.memory - before < ALLOWED_GROWTH


def test_a_stop_in_the_middle_of_an_upload_leaves_nothing(environment: dict[str, str], server: ServerProcess) -> None:
    folder = Path(environment["VLLM_BATCH_HOME"]) / "files"
    body = b"".join(form_of([b"x" * MIB] * 5))
    with socket.create_connection(("127.0.0.1", int(environment["API_PORT"]))) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=cut\r\n\r\n")
        connection.sendall(body[: 4 * MIB + MIB // 2])
        wait_for(lambda: stored_bytes(folder) > 0)
        server.process.terminate()
        server.process.communicate(timeout=PATIENCE_SECONDS)

    assert server.process.returncode == 0
    assert not [path for path in folder.rglob("*") if path.is_file()]


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(server: ServerProcess, number: signal.Signals) -> None:
    assert get(f"{server.url}/health").status_code == 200
    server.process.send_signal(number)
    server.process.communicate(timeout=PATIENCE_SECONDS)
    assert server.process.returncode == 0
    with pytest.raises(httpx2.ConnectError):
        get(server.url)


def test_a_restart_keeps_files_and_batches(environment: dict[str, str], server: ServerProcess) -> None:
    file = upload(server.url, 1)
    params = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    batch = httpx2.post(f"{server.url}/v1/batches", json=params, timeout=PATIENCE_SECONDS).json()
    server.process.kill()
    server.process.wait()

    again = start(environment)
    try:
        assert again.stderr is not None
        assert any("listening" in line for line in again.stderr)
        assert get(f"{server.url}/v1/files/{file['id']}").json() == file
        assert get(f"{server.url}/v1/batches/{batch['id']}").json() == batch
    finally:
        again.kill()
        again.communicate()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_without_keys_only_loopback_is_served(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no keys yet.*keys create.*API_HOST=127\.0\.0\.1"):
        serve(Settings(vllm_batch_home=tmp_path / "home", api_host=host))


def test_a_container_may_listen_on_every_address(environment: dict[str, str]) -> None:
    process = start(environment | {"API_HOST": "0.0.0.0", "API_ALLOW_REMOTE": "true"})
    try:
        assert process.stderr is not None
        assert any("listening" in line for line in process.stderr)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_loopback_is_known_by_all_its_names(host: str) -> None:
    assert is_loopback(host)


def test_a_taken_port_is_one_clear_sentence(environment: dict[str, str]) -> None:
    with bind_listener("127.0.0.1", int(environment["API_PORT"])):
        process = start(environment)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)

    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{environment['API_PORT']}" in said
    assert "set API_PORT" in said
    assert "Traceback" not in said
