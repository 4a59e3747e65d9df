"""Keys and a running `python -m api_shim`: changes by `vllm-batch keys` without a restart, addresses, the log."""

import contextlib
import os
import secrets
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from tests.api.conftest import PATIENCE_SECONDS, wait_for
from tests.ports import hold_ports
from vllm_batch_dagster.cli.main import app as command_line
from vllm_batch_dagster.core.keys import hash_secret, new_secret

PROJECT = Path(__file__).parents[2]
BATCH_PARAMS = {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"}


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


class Server:
    """`python -m api_shim` on a free port; `log` is what it said, whole after `stop`."""

    def __init__(self, home: Path, log: Path, **environment: str) -> None:
        self.url = f"http://127.0.0.1:{environment['API_PORT']}"
        self._log = log
        variables = os.environ | {"VLLM_BATCH_HOME": str(home), "POSTGRES_HOST": "", **environment}
        with log.open("wb") as output:
            command = [sys.executable, "-m", "api_shim"]
            self._process = subprocess.Popen(command, env=variables, cwd=PROJECT, stderr=output, stdout=output)
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 2 * PATIENCE_SECONDS
        while "listening" not in self.log:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.05)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []
    ports = ExitStack()
    catalogue = tmp_path / "models.yaml"
    catalogue.write_text("models:\n- {name: tiny, path: models/tiny}\n")

    def serve(**environment: str) -> Server:
        log = tmp_path / f"log-{len(started)}"
        (port,) = ports.enter_context(hold_ports(1))
        defaults = {"API_PORT": str(port), "API_HOST": "127.0.0.1", "MODELS_FILE": str(catalogue)}
        started.append(Server(tmp_path / "home", log, **defaults | environment))
        return started[-1]

    yield serve
    for server in started:
        server.stop()
    ports.close()


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run `vllm-batch keys ...` on the state folder of `serve`; returns its standard output."""
    monkeypatch.setenv("VLLM_BATCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POSTGRES_HOST", "")

    def keys(*arguments: str) -> str:
        result = CliRunner().invoke(command_line, ["keys", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout.strip()

    return keys


def status_of(server: Server, secret: str | None) -> int:
    return ask(server, "files", secret).status_code


def ask(server: Server, path: str, secret: str | None) -> httpx2.Response:
    headers = bearer(secret) if secret else {}
    return httpx2.get(f"{server.url}/v1/{path}", headers=headers, timeout=PATIENCE_SECONDS)


def test_a_running_api_follows_the_command_line(serve: Callable[..., Server], keys: Callable[..., str]) -> None:
    server = serve()
    assert "no key exists" in server.log
    assert "and no other machine" in server.log
    assert status_of(server, None) == 200

    secret = keys("create", "--project", "team-a", "--label", "ci")
    wait_for(lambda: status_of(server, None) == 401)
    assert status_of(server, secret) == 200

    listed = keys("list")
    assert "team-a" in listed
    assert secret not in listed
    assert hash_secret(secret) not in listed
    keys("revoke", keys("list", "--json").partition('"id": "')[2].partition('"')[0])
    wait_for(lambda: status_of(server, secret) == 401)
    assert status_of(server, None) == 401


def test_with_a_key_other_machines_may_be_served(serve: Callable[..., Server], keys: Callable[..., str]) -> None:
    secret = keys("create", "--project", "team-a")
    server = serve(API_HOST="0.0.0.0")
    assert "with a key only" in server.log
    assert (status_of(server, None), status_of(server, secret)) == (401, 200)


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_no_key_ever_reaches_the_log(
    serve: Callable[..., Server], keys: Callable[..., str], tmp_path: Path, log_format: str
) -> None:
    secret, wrong = keys("create"), new_secret(secrets.token_bytes)
    server = serve(LOG_FORMAT=log_format)
    for sent in (wrong, secret):
        ask(server, "files/unknown", sent)
        batches = f"{server.url}/v1/batches"
        made = httpx2.post(batches, headers=bearer(sent), json=BATCH_PARAMS, timeout=PATIENCE_SECONDS)
    spoil_batches(tmp_path / "home" / "batches.db")
    crash = ask(server, f"batches/{made.json()['id']}", secret)
    assert crash.status_code == 500
    wait_for(lambda: "ValueError" in server.log)

    for sent in (secret, wrong):
        assert sent not in server.log
        assert sent[3:15] not in server.log
        assert sent not in crash.text


def spoil_batches(path: Path) -> None:
    """Make the next read of a batch crash in a way that nobody foresaw."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        assert database.execute("UPDATE batches SET status = 'nonsense'").rowcount == 1
