"""A template for a handler of yours: copy it, change what `deliver` does, and set HANDLER_MODULES to the copy.

It writes one small JSON file for each batch: how many lines were answered, and how the others failed. On when
SUMMARY_FOLDER says where. docs/handlers.md explains each part.
"""

import json
import os
from collections import Counter
from pathlib import Path

from handlers.base import Delivery, Handler
from handlers.registry import register_handler


class SummaryHandler(Handler):
    """Writes `<folder>/<batch id>.json`."""

    def __init__(self) -> None:
        self._folder = os.environ.get("SUMMARY_FOLDER", "")  # made anew in each run: read your settings here

    def name(self) -> str:
        return "summary"  # deliveries are stored under it: do not change it later

    def enabled(self) -> bool:
        return bool(self._folder)

    def check(self) -> None:
        """What `vllm-batch doctor` asks: raise when it could not work now."""
        if not os.access(self._folder, os.W_OK):
            raise PermissionError(f"SUMMARY_FOLDER {self._folder} cannot be written")

    def deliver(self, delivery: Delivery) -> None:
        """Any exception means: again later. Raise `handlers.base.Undeliverable` where that would be useless."""
        failures: Counter[str] = Counter()
        answered = sum(1 for _ in delivery.output.lines())  # raw lines; iterate over `delivery.output` to parse them
        for line in delivery.errors:  # one line at a time: keep none of them
            failures[line["error"]["code"] if line["error"] else str(line["response"]["status_code"])] += 1
        summary = {
            "batch_id": delivery.batch.id,
            "version": delivery.version,  # higher when a chunk was run again
            "delivery_key": delivery.key,  # the same on each attempt: give it to a service that knows such keys
            "answered": answered,
            "failures": dict(failures),
        }
        self._replace(f"{delivery.batch.id}.json", json.dumps(summary))

    def _replace(self, name: str, content: str) -> None:
        """May run twice, and be cut anywhere: the file is there whole, or not at all, and never twice."""
        partial = Path(self._folder) / f".{name}.partial"
        partial.write_text(content)
        partial.replace(Path(self._folder) / name)


register_handler(SummaryHandler())
