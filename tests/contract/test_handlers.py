"""The built-in handlers keep the contract that third parties can run on theirs."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from handlers.base import Handler
from handlers.directory import DirectoryHandler
from handlers.testing import HandlerContract


class TestDirectory(HandlerContract):
    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "out"

    def make(self) -> Handler:
        return DirectoryHandler(str(self.folder))

    def arrived(self, batch_id: str) -> Sequence[str]:
        with (self.folder / f"{batch_id}.jsonl").open() as lines:
            return [json.loads(line)["custom_id"] for line in lines]
