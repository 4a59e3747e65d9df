"""Real clients as real processes of their own environments. All are started at once: most of their time is waiting."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.clients.environments import python_of
from tests.target import Target

PROGRAMS = Path(__file__).parent / "programs"
SECONDS = 800
OLD_OPENAI, PARASAIL, PARASAIL_CLI = "openai-1.60", "openai-batch-0.3.3", "openai-batch-0.3.4"


@dataclass(frozen=True, slots=True)
class Client:
    """One process. `folder` is its working folder, with its files and what it says."""

    process: "subprocess.Popen[bytes]"
    folder: Path

    def said(self) -> str:
        """Wait for its end, which has to be a good one. Returns what it printed."""
        try:
            code = self.process.wait(SECONDS)
        finally:
            self.process.kill()
        words = (self.folder / "stdout").read_text()
        assert code == 0, words + (self.folder / "stderr").read_text()
        return words

    def result(self) -> Mapping[str, Any]:
        """Return the last line of what it printed, which is JSON."""
        result: Mapping[str, Any] = json.loads(self.said().splitlines()[-1])
        return result


class Clients:
    """Starts clients against one target. Their environment has nothing of ours but the key."""

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder = folder
        self._target = target
        self._started: dict[str, Client] = {}

    def __getitem__(self, name: str) -> Client:
        return self._started[name]

    def start(self, name: str, python: Path, *arguments: str) -> Client:
        """Start `python arguments`."""
        folder = self._folder / name
        folder.mkdir()
        env = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "PYTHON"))}
        with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [str(python), *arguments],
                cwd=folder,
                env={**env, "OPENAI_API_KEY": self._target.api_key},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        self._started[name] = Client(process, folder)
        return self._started[name]

    def start_all(self) -> None:
        """Start every client that makes a batch."""
        target = self._target
        where = (target.base_url, target.api_key)
        parasail, oldest = python_of(PARASAIL), python_of(OLD_OPENAI)
        self.start("readme_parasail", parasail, program("readme_parasail"), target.base_url)
        requests = (*where, target.model, "https://your-app.invalid/webhook")
        self.start("readme_requests", parasail, program("readme_requests"), *requests)
        for kind in ("chat", "embeddings", "score", "rerank"):
            model = target.model if kind == "chat" else target.embedding_model
            self.start(kind, parasail, program("parasail"), *where, model, kind)
        self.start("oldest", oldest, program("official"), *where, target.model, "/v1/chat/completions")
        latest = (*where, target.embedding_model, "/v1/embeddings")
        self.start("latest", Path(sys.executable), program("official"), *latest)

    def stop(self) -> None:
        for client in self._started.values():
            client.process.kill()
            client.process.wait()


def program(name: str) -> str:
    return str(PROGRAMS / f"{name}.py")
