"""Fills the batch store with batches that have ended, as a server has them that ran for weeks. One transaction."""

import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import insert

from vllm_batch_dagster.adapters.store import open_store
from vllm_batch_dagster.adapters.store.database import Database, read_url
from vllm_batch_dagster.adapters.store.rows import batch_row
from vllm_batch_dagster.adapters.store.schema import batches
from vllm_batch_dagster.core.models import Batch, RequestCounts, Usage
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.settings import Settings

_APART_SECONDS = 3  # so that all of them ended today: retention has nothing to do yet


def seed_batches(settings: Settings, count: int) -> None:
    """Write `count` completed batches, the newest a minute old."""
    settings.vllm_batch_home.mkdir(parents=True, exist_ok=True)
    open_store(settings.database_url)  # creates the schema
    database = Database(read_url(settings.database_url))
    try:
        with database.writing() as connection:
            connection.execute(insert(batches), list(_rows(count, int(time.time()) - 60)))
    finally:
        database.close()


def _rows(count: int, newest: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield batch_row(_ended_batch(number, newest - (count - 1 - number) * _APART_SECONDS))


def _ended_batch(number: int, at: int) -> Batch:
    lines = 1 + number % 50_000
    return Batch(
        id=f"batch_seed{number:032x}",
        input_file_id=f"file-seedin{number:014d}",
        endpoint="/v1/chat/completions",
        completion_window="24h",
        status=BatchStatus.COMPLETED,
        created_at=at,
        expires_at=at + 86_400,
        metadata={"customer": f"customer-{number % 17}", "run": str(number)},
        model="simulated",
        counts=RequestCounts(total=lines, completed=lines, failed=0),
        usage=Usage(input_tokens=lines * 50, output_tokens=lines * 20),
        output_file_id=f"file-seedout{number:013d}",
        in_progress_at=at,
        finalizing_at=at,
        completed_at=at,
        result_version=1,
        merged_version=1,
    )
