"""A state folder with batches in every stage, for the tests of retention: the store in memory, real files, and a
Dagster that is only a list of runs."""

import os
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.unit.conftest import Rig
from vllm_batch_dagster.adapters.local_disk import LocalDisk
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.core.models import DAY_SECONDS
from vllm_batch_dagster.core.ports import FileStore
from vllm_batch_dagster.core.retention import Kind, RetentionReport, RetentionRules
from vllm_batch_dagster.core.retention_ports import Removed
from vllm_batch_dagster.stages.intake import cancel_batch
from vllm_batch_dagster.stages.retention import Retention, RetentionPorts
from vllm_batch_dagster.stages.uploads import PartReceipt, UploadPorts, create_upload

EVERYTHING = RetentionRules(batch_days=30, record_days=60, dataset_days=90)


@dataclass
class FakeGraph:
    """See GraphHistory. Two runs per batch; `while_forgetting` is what somebody does just then in the UI."""

    active: set[str] = field(default_factory=set)
    runs: dict[str, int] = field(default_factory=dict)
    while_forgetting: Callable[[str], None] = lambda batch_id: None
    zombies: Sequence[str] = ()

    def busy(self) -> Collection[str]:
        return self.active

    def is_busy(self, batch_id: str) -> bool:
        return batch_id in self.active

    def forget(self, batch_id: str, *, dry_run: bool = False) -> Removed:
        runs = self.runs.get(batch_id, 0)
        if not dry_run:
            self.runs.pop(batch_id, None)
            self.while_forgetting(batch_id)
        return Removed(runs, runs * 1000)

    def tidy(self, now: float, *, dry_run: bool = False) -> Removed:
        return Removed()

    def stuck(self, now: float) -> Sequence[str]:
        return self.zombies


class House:
    """A state folder whose clock is that of its files, with one completed batch, one open and one cancelled."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.graph = rig, FakeGraph()
        rig.clock.now = time.time()
        self.disk = LocalDisk(rig.folder / "files", rig.folder / "batches", rig.folder / "datasets")
        self.files: FileStore = rig.files

    async def completed(self, lines: int = 7) -> str:
        batch_id = self.rig.start(lines)
        await self.rig.infer(batch_id, EchoEngine())
        self.rig.merge(batch_id)
        self.graph.runs[batch_id] = 2
        return batch_id

    def upload(self, *parts: bytes) -> str:
        """Create an upload that nobody completes."""
        ports = UploadPorts(self.rig.store, self.rig.files, self.rig.clock, secrets.token_bytes)
        size = sum(map(len, parts)) or 1
        params = {"bytes": size, "filename": "in.jsonl", "purpose": "batch", "mime_type": "application/jsonl"}
        upload = create_upload(params, ports)
        for part in parts:
            receipt = PartReceipt(upload, ports)
            receipt.write(part)
            receipt.finish()
        return upload.id

    def cancelled(self) -> str:
        batch_id = self.rig.start(4)
        cancel_batch(batch_id, self.rig.store, self.rig.clock)
        self.rig.merge(batch_id)
        return batch_id

    def ports(self) -> RetentionPorts:
        return RetentionPorts(self.rig.store, self.files, self.disk, self.graph, self.rig.clock)

    def sweep(self, rules: RetentionRules = EVERYTHING, **options: bool) -> RetentionReport:
        return Retention(self.ports(), rules, **options).run()

    def later(self, days: float) -> None:
        self.rig.clock.advance(days * DAY_SECONDS)

    def folders(self) -> set[str]:
        return {item.name for item in self.disk.batches()}

    def stored(self) -> set[str]:
        return {item.name for item in self.disk.contents()}

    def recorded(self) -> set[str]:
        return {file.id for file in self.rig.store.files.list().data}

    def everything(self) -> tuple[set[str], set[str], set[str], list[Any]]:
        batches = self.rig.store.batches.list(limit=100).data
        return self.folders(), self.stored(), self.recorded(), list(batches)

    def lay(self, path: str, age_days: float = 0.0, content: bytes = b"left") -> Path:
        """Leave a file in the state folder that was last written so many days ago."""
        place = self.rig.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        self.age(place, age_days)
        return place

    def age(self, path: Path, days: float) -> None:
        at = self.rig.clock.now - days * DAY_SECONDS
        os.utime(path, (at, at))


def counts(report: RetentionReport) -> dict[Kind, int]:
    return {kind: tally.count for kind, tally in report.tallies.items() if tally.count}
