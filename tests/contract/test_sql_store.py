"""What only a store on disk can show: processes that meet in it, their death, index use, errors of the driver."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, text

from vllm_batch_dagster.adapters.store import SqlStore, open_store
from vllm_batch_dagster.adapters.store.database import Database, read_url
from vllm_batch_dagster.adapters.store.schema import NEEDS_ATTENTION
from vllm_batch_dagster.core.errors import StaleAttempt, StorageFailure
from vllm_batch_dagster.core.models import Attempt, Batch, ChunkRange, ChunkSummary, RequestCounts, Usage
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus

ROOT = Path(__file__).parents[2]
BATCH = Batch("batch_1", "file-1", "/v1/embeddings", "24h", BatchStatus.VALIDATING, 10, 20)
SUMMARY = ChunkSummary(RequestCounts(10, 10, 0), Usage(1))

BEGIN = """
import sys
from vllm_batch_dagster.adapters.store import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    print(store.chunks.begin("batch_1", 0, fresh=False, run_id="run", now=1).epoch, flush=True)
"""

# Makes a change, says so, and hangs before the transaction ends.
HANG = """
import sys, time
from sqlalchemy import text
from vllm_batch_dagster.adapters.store.database import Database, read_url
with Database(read_url(sys.argv[1])).writing() as connection:
    connection.execute(text("UPDATE batches SET status = 'failed'"))
    print("changed", flush=True)
    time.sleep(600)
"""

# Acknowledges a cancel and is killed by whoever reads that.
ACKNOWLEDGE = """
import sys, time
from vllm_batch_dagster.adapters.store import open_store
from vllm_batch_dagster.core.states import BatchEvent
print(open_store(sys.argv[1]).batches.advance("batch_1", BatchEvent.CANCEL, 30).status.value, flush=True)
time.sleep(600)
"""


def start_python(script: str, url: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, url]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def planned(sql_store: SqlStore) -> SqlStore:
    sql_store.batches.add(BATCH)
    sql_store.chunks.plan("batch_1", [ChunkRange(0, 0, 10, 0, 100)])
    return sql_store


def test_processes_that_begin_the_same_chunk_get_different_epochs(planned: SqlStore, sql_url: str) -> None:
    processes = [start_python(BEGIN, sql_url) for _ in range(2)]
    assert [read_line(process) for process in processes] == ["ready", "ready"]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    epochs = [[int(line) for line in process.communicate(timeout=200)[0].split()] for process in processes]

    assert sorted(epochs[0] + epochs[1]) == list(range(1, 41))
    old, new = sorted(mine[-1] for mine in epochs)
    with pytest.raises(StaleAttempt):
        planned.chunks.publish(Attempt("batch_1", 0, old, 1, 0), SUMMARY, 5)
    planned.chunks.publish(Attempt("batch_1", 0, new, 1, 0), SUMMARY, 5)
    assert planned.chunks.get("batch_1", 0).published_epoch == 40


def test_a_process_killed_inside_a_transaction_changes_nothing(planned: SqlStore, sql_url: str) -> None:
    process = start_python(HANG, sql_url)
    assert read_line(process) == "changed"
    assert planned.batches.get("batch_1").status is BatchStatus.VALIDATING  # a reader is not held up
    kill(process)

    assert planned.batches.advance("batch_1", BatchEvent.PLANNED, 30).status is BatchStatus.IN_PROGRESS


def test_what_was_acknowledged_survives_the_death_of_its_process(planned: SqlStore, sql_url: str) -> None:
    process = start_python(ACKNOWLEDGE, sql_url)
    assert read_line(process) == "cancelling"
    kill(process)

    assert planned.batches.get("batch_1").status is BatchStatus.CANCELLING


def test_sqlite_waits_for_the_disk_and_checks_references(sqlite_url: str) -> None:
    database = Database(read_url(sqlite_url))
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    with database.reading() as connection:
        found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in expected}
    database.close()
    assert found == expected


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("SELECT * FROM files ORDER BY created_at DESC, seq DESC LIMIT 3", "files_by_time"),
        ("SELECT * FROM files WHERE (created_at, seq) < (7, 7) ORDER BY created_at DESC, seq DESC", "files_by_time"),
        ("SELECT * FROM files WHERE project_id = 'a' ORDER BY created_at, seq LIMIT 3", "files_by_project"),
        (
            "SELECT * FROM files WHERE purpose = 'batch' AND project_id = 'a' ORDER BY created_at, seq LIMIT 3",
            "files_by_purpose",
        ),
        ("SELECT * FROM batches ORDER BY created_at DESC, seq DESC LIMIT 3", "batches_by_time"),
        (
            "SELECT * FROM batches WHERE (created_at, seq) < (7, 7) AND project_id = 'a' "
            "ORDER BY created_at DESC, seq DESC LIMIT 3",
            "batches_by_project",
        ),
        (f"SELECT * FROM batches WHERE {NEEDS_ATTENTION} ORDER BY created_at, seq", "batches_needing_attention"),
        ("SELECT * FROM chunks WHERE batch_id = 'b' ORDER BY idx", "chunks"),
        ("SELECT * FROM events WHERE batch_id = 'b'", "events"),
    ],
)
def test_a_listing_reads_along_an_index(sql_url: str, query: str, index: str) -> None:
    """The queries are those of paging.py and batch_records.py as they are sent, with values filled in."""
    engine = create_engine(sql_url)
    with engine.connect() as connection:
        if engine.name == "sqlite":
            plan = str(connection.execute(text(f"EXPLAIN QUERY PLAN {query}")).all())
        else:
            # A few rows are cheaper to read whole; what matters is what the planner can do.
            connection.execute(text("SET enable_seqscan = off"))
            connection.execute(text("SET enable_bitmapscan = off"))
            plan = str(connection.execute(text(f"EXPLAIN {query}")).all())
    engine.dispose()
    assert index in plan
    assert "INDEX" in plan.upper()
    assert "Sort" not in plan
    assert "TEMP B-TREE" not in plan


def test_the_statements_of_the_store_are_those_explained(sql_store: SqlStore) -> None:
    """Guards the test above: `open` carries the literal condition that the partial index was made with."""
    statements: list[str] = []
    engine = sql_store._database._engine
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    sql_store.batches.open()
    sql_store.files.list(limit=3)
    assert any(NEEDS_ATTENTION in statement and "ORDER BY batches.created_at" in statement for statement in statements)
    assert any("ORDER BY files.created_at DESC, files.seq DESC" in statement for statement in statements)


def test_a_locked_database_is_a_storage_failure(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_batch_dagster.adapters.store.database.BUSY_SECONDS", 0.1)
    store, other = open_store(sqlite_url), Database(read_url(sqlite_url))
    with other.writing(), pytest.raises(StorageFailure, match="database is locked"):
        store.batches.add(BATCH)
    store.batches.add(BATCH)
    store.close()
    other.close()


def test_a_value_that_the_database_cannot_keep_is_a_storage_failure(postgres_url: str) -> None:
    store = open_store(postgres_url)
    with pytest.raises(StorageFailure) as failure:
        store.batches.get("secret\0id")
    assert "secret" not in str(failure.value)
    assert "secret" not in str(failure.value.__cause__)  # what a log shows of it
    store.close()
