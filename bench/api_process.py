"""The API alone as a process, a client that costs next to nothing, and dd: what the scenario `upload` measures with."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.errors import BenchFailed

_START_SECONDS = 60
_STOP_SECONDS = 20
_HEAD = (
    b'--cut\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--cut\r\nContent-Disposition: form-data; name="file"; filename="input.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n"
)
_TAIL = b"\r\n--cut--\r\n"


class ApiProcess:
    """`python -m api_shim` that listens on `port`, with its state in `home`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, home: Path) -> None:
        self.pid, self.port, self.home = process.pid, port, home

    def upload(self, path: Path) -> float:
        """Send the file in one request and return the seconds until its 200. Raises BenchFailed."""
        length = len(_HEAD) + path.stat().st_size + len(_TAIL)
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: bench\r\nContent-Length: {length}\r\nConnection: close\r\n"
            "Content-Type: multipart/form-data; boundary=cut\r\n\r\n"
        )
        began = time.perf_counter()
        with socket.create_connection(("127.0.0.1", self.port)) as connection, path.open("rb") as file:
            connection.sendall(head.encode() + _HEAD)
            connection.sendfile(file)
            connection.sendall(_TAIL)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        seconds = time.perf_counter() - began
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise BenchFailed(f"the upload was refused: {answer[:500].decode(errors='replace')}")
        return seconds

    def forget_uploads(self) -> None:
        """Make room on the disk; the records stay."""
        for path in (self.home / "files").glob("file-*"):
            path.unlink()


@contextmanager
def running_api(folder: Path, models_file: Path) -> Iterator[ApiProcess]:
    """Run the API until the block ends. Raises BenchFailed when it does not start."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    home, log = folder / "home", folder / "api.log"
    variables = {"VLLM_BATCH_HOME": home, "API_PORT": port, "MODELS_FILE": models_file, "MAX_FILE_BYTES": 0}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "api_shim"],
            cwd=folder,  # where no .env is
            env={**os.environ, **{name: str(value) for name, value in variables.items()}},
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us; we stop it in order
        )
    try:
        _wait_until_ready(process, port, log)
        yield ApiProcess(process, port, home)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise BenchFailed(f"the API did not start:\n{log.read_text(errors='replace')[-3000:]}")


def copy_with_dd(source: Path, target: Path) -> float:
    """Copy with `dd bs=1M conv=fsync`, remove the copy, and return the seconds. Raises BenchFailed."""
    command = ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    target.unlink(missing_ok=True)
    if done.returncode:
        raise BenchFailed(f"dd failed: {done.stderr}")
    return seconds
