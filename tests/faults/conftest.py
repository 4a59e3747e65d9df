"""The API as a process of its own, to be killed and started again on the same state."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import yaml

from tests.stack import free_ports
from vllm_batch_dagster.failpoints import VARIABLE
from vllm_batch_dagster.settings import PROJECT_ROOT, Settings


class ApiProcess:
    """`python -m api_shim` on a home of its own. Only the process is killed, never what it has stored. `points` is the
    folder of its failpoints."""

    def __init__(self, folder: Path) -> None:
        catalogue = folder / "models.yaml"
        catalogue.write_text(yaml.safe_dump({"models": [{"name": "tiny", "path": "models/tiny"}]}))
        self.port = free_ports(1)[0]
        self.points = folder / "failpoints"
        self.points.mkdir()
        ours = {name.upper() for name in Settings.model_fields}
        self.home = folder / "home"
        self._environment = {name: value for name, value in os.environ.items() if name not in ours} | {
            "VLLM_BATCH_HOME": str(self.home),
            "MODELS_FILE": str(catalogue),
            "API_PORT": str(self.port),
            "LOG_FORMAT": "json",
            "MAX_FILE_BYTES": "0",
            VARIABLE: str(self.points),
        }
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def files(self) -> Path:
        return self.home / "files"

    def start(self) -> None:
        """Return when it listens."""
        command = [sys.executable, "-m", "api_shim"]
        self._process = subprocess.Popen(
            command, env=self._environment, cwd=PROJECT_ROOT, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        said: list[str] = []
        for line in self._process.stderr:
            said.append(line)
            if "listening" in line:
                return
        pytest.fail(f"the server ended before it listened:\n{''.join(said)}")

    def kill(self) -> None:
        """SIGKILL. Harmless when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=240, headers={"accept-encoding": "identity"})

    def visible(self) -> list[str]:
        """Names of the files of the file store. What is still arriving and what is a part is not among them."""
        return sorted(path.name for path in self.files.iterdir() if path.is_file())


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiProcess]:
    process = ApiProcess(tmp_path)
    process.start()
    yield process
    process.kill()
