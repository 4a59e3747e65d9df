"""A process that dies between what a handler commits and the note of it, or in the middle: nothing is doubled later.

On the real stage, store and servers; the process is killed by SIGKILL. And 50,000 results leave memory flat.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars
import psycopg
import pytest
from psycopg import sql

from handlers.courier import HandlerCourier
from handlers.testing import answered, refused, unanswered
from tests.contract.handler_child import COMMITTED, MIDDLE, deliver
from tests.contract.object_server import ObjectServer, list_keys, list_unfinished, read_object
from vllm_batch_dagster.adapters.local_files import LocalFiles
from vllm_batch_dagster.adapters.store import open_store
from vllm_batch_dagster.core.deliveries import DeliveryState
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.settings import PROJECT_ROOT

NOW, LATER = 1_800_000_000, 1_800_001_000
BATCH = "batch_kill"
LINES = 20_000  # with 1.8 KB each, more than parts of an upload, groups of rows and buffers of COPY
MANY, MOST_GROWTH = 50_000, 64 << 20
DESTINATIONS = ("directory", "parquet", "parquet on s3", "postgres", "s3")
EXPECTED = sorted([*(f"line-{number}" for number in range(LINES)), "c", "d"])

_schemas = itertools.count(1)


@dataclass(frozen=True)
class Destination:
    """One handler, what switches it on, and where its things arrive."""

    handler: str
    variables: Mapping[str, str]
    objects: ObjectServer

    def arrived(self, batch_id: str = BATCH) -> list[str]:
        """Return the custom_id of everything that stands there, in order; there must be nothing else."""
        if "HANDLER_POSTGRES_DSN" in self.variables:
            return sorted(self._rows(batch_id))
        if "DELIVERY_FOLDER" in self.variables:
            folder = Path(self.variables["DELIVERY_FOLDER"])
            assert [path.name for path in folder.iterdir()] == [f"{batch_id}.jsonl"]
            return sorted(_ids((folder / f"{batch_id}.jsonl").read_bytes()))
        url = self.url
        if not url.startswith("s3:"):
            files = [path for path in Path(url).rglob("*") if path.is_file() and path.name != "lock"]
            assert files == [Path(url) / "results" / f"batch={batch_id}" / "results.parquet"]
            return sorted(polars.read_parquet(files[0])["custom_id"])
        assert list_unfinished(self.objects, url) == []
        return sorted(self._objects(url, batch_id))

    @property
    def url(self) -> str:
        return self.variables.get("HANDLER_S3_URL") or self.variables.get("HANDLER_PARQUET_URL", "")

    def _rows(self, batch_id: str) -> list[str]:
        with psycopg.connect(self.variables["HANDLER_POSTGRES_DSN"]) as connection:
            table = sql.Identifier(self.variables["HANDLER_POSTGRES_SCHEMA"], "results")
            select = sql.SQL("SELECT custom_id FROM {} WHERE batch_id = %s").format(table)
            return [row[0] for row in connection.execute(select, (batch_id,))]

    def _objects(self, url: str, batch_id: str) -> list[str]:
        keys = list_keys(self.objects, url)
        if self.handler == "parquet":
            (key,) = keys
            return polars.read_parquet(read_object(self.objects, url, key))["custom_id"].to_list()
        assert keys == [f"{batch_id}/manifest.json", f"{batch_id}/v1/errors.jsonl", f"{batch_id}/v1/output.jsonl"]
        return [name for key in keys[1:] for name in _ids(read_object(self.objects, url, key))]


def _ids(lines: bytes) -> list[str]:
    return [json.loads(line)["custom_id"] for line in lines.splitlines()]


@pytest.fixture(params=DESTINATIONS)
def destination(
    request: pytest.FixtureRequest,
    objects: ObjectServer,
    handler_dsn: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Destination:
    name: str = request.param
    endpoint = {"HANDLER_S3_ENDPOINT_URL": objects.endpoint_url}
    variables = {
        "directory": {"DELIVERY_FOLDER": str(tmp_path / "out")},
        "parquet": {"HANDLER_PARQUET_URL": str(tmp_path / "out")},
        "parquet on s3": {"HANDLER_PARQUET_URL": objects.new_prefix(), **endpoint},
        "postgres": {
            "HANDLER_POSTGRES_DSN": handler_dsn,
            "HANDLER_POSTGRES_SCHEMA": f"killed_{next(_schemas)}",
        },
        "s3": {"HANDLER_S3_URL": objects.new_prefix(), **endpoint},
    }[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    return Destination(name.split()[0], variables, objects)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A state folder with a batch that has ended and was told to nobody yet."""
    folder = tmp_path / "home"
    files, noise = LocalFiles(folder / "files"), random.Random(1)  # noise: Parquet cannot make it small
    _store(files, "file-output", [answered(f"line-{number}", noise.randbytes(700).hex()) for number in range(LINES)])
    _store(files, "file-error", [refused("c"), unanswered("d")])
    store = open_store(f"sqlite:///{folder / 'batches.db'}")
    batch = Batch(BATCH, "file-1", "/v1/chat/completions", "24h", BatchStatus.FINALIZING, NOW - 9, NOW + 9)
    store.batches.add(replace(batch, result_version=1, model="tiny"))
    ids = {"output_file_id": "file-output", "error_file_id": "file-error"}
    store.batches.advance(BATCH, BatchEvent.PUBLISHED, NOW, merged_version=1, **ids)
    store.close()
    (folder / "now").write_text(str(NOW))
    return folder


def _store(files: LocalFiles, file_id: str, lines: Sequence[object]) -> None:
    stored = files.create(file_id)
    for line in lines:
        stored.write(json.dumps(line).encode() + b"\n")
    stored.commit()


def run_child(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.contract.handler_child", *arguments]
    return subprocess.run(command, cwd=PROJECT_ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("point", [COMMITTED, MIDDLE])
def test_a_delivery_whose_process_died_is_made_again_and_doubles_nothing(
    destination: Destination, house: Path, point: str
) -> None:
    killed = run_child("kill", str(house), point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if point == COMMITTED:
        assert destination.arrived() == EXPECTED
    elif destination.url.startswith("s3:"):
        assert list_unfinished(destination.objects, destination.url)

    courier = HandlerCourier(LocalFiles(house / "files"), limit_seconds=600)
    (delivery,) = deliver(house, courier, LATER, "second run")

    assert (delivery.state, delivery.attempts) == (DeliveryState.DELIVERED, 2), delivery.last_error
    assert destination.arrived() == EXPECTED


def test_many_results_leave_memory_flat(destination: Destination, tmp_path: Path) -> None:
    """80 MB of results; the process grows by what one part, group or buffer takes."""
    path = tmp_path / "many.jsonl"
    with path.open("wb") as file:
        for number in range(MANY):
            file.write(json.dumps(answered(f"line-{number}", "word " * 250)).encode() + b"\n")
    child = run_child("measure", destination.handler, str(path))
    assert child.returncode == 0, child.stderr
    assert path.stat().st_size > MOST_GROWTH
    assert int(child.stdout) < MOST_GROWTH
