"""The simplest handler: copies the results of each finished batch into a folder, one file a batch.

Switched on by DELIVERY_FOLDER. The file appears under its name only when it is whole, so another program may watch
the folder.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from handlers.base import ResultHandler, Results
from handlers.settings import HandlerSettings


class DirectoryHandler(ResultHandler):
    """Writes `<folder>/<batch id>.jsonl`: output lines, then error lines. A repeat replaces the file."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder if folder is not None else HandlerSettings().delivery_folder

    def name(self) -> str:
        return "directory"

    def enabled(self) -> bool:
        return bool(self._folder)

    def handle(self, batch_id: str, results: Results, metadata: Mapping[str, str]) -> bool:
        folder = Path(self._folder)
        folder.mkdir(parents=True, exist_ok=True)
        # A name of its own, and those of earlier attempts are taken away: one may have been given up and still be
        # writing, or its process was killed.
        for stale in folder.glob(f".{batch_id}.*.partial"):
            stale.unlink(missing_ok=True)
        partial = folder / f".{batch_id}.{secrets.token_hex(4)}.partial"
        try:
            with partial.open("xb") as copy:
                for line in results.lines():
                    copy.write(line)
                copy.flush()
                os.fsync(copy.fileno())
            partial.replace(folder / f"{batch_id}.jsonl")
        finally:
            partial.unlink(missing_ok=True)
        return True
