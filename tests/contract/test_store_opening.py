"""Opening the SQL store: creating, upgrading, being fast when there is nothing to do, and failing in clear words."""

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from sqlalchemy import create_engine, inspect, text

from vllm_batch_dagster.adapters.store import open_store, schema
from vllm_batch_dagster.adapters.store.opening import ADVISORY_LOCK
from vllm_batch_dagster.core.errors import ConfigurationError, StorageFailure
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.states import BatchStatus

ROOT = Path(__file__).parents[2]
MIGRATIONS = Path(schema.__file__).with_name("migrations")
BATCH = Batch("batch_1", "file-1", "/v1/embeddings", "24h", BatchStatus.VALIDATING, 1, 2)

OPEN = """
import sys
from vllm_batch_dagster.adapters.store import open_store
print("ready", flush=True)
sys.stdin.readline()
store = open_store(sys.argv[1])
print(len(store.batches.list().data), "alembic" in sys.modules)
"""


def start_opener(url: str) -> "subprocess.Popen[str]":
    """Start a process that has imported the store and waits for a line before it opens it."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", OPEN, url]
    opener = subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    assert opener.stdout is not None
    assert opener.stdout.readline() == "ready\n"
    return opener


def let_go(opener: "subprocess.Popen[str]") -> None:
    assert opener.stdin is not None
    opener.stdin.write("go\n")
    opener.stdin.flush()


def finish(opener: "subprocess.Popen[str]") -> str:
    """Return what the process says: how many batches it sees, and whether it imported Alembic."""
    out, err = opener.communicate(timeout=200)
    assert opener.returncode == 0, err
    return out.strip()


def test_an_empty_place_gets_the_schema(empty_url: str) -> None:
    store = open_store(empty_url)
    store.batches.add(BATCH)
    store.close()

    again = open_store(empty_url)
    assert again.batches.get("batch_1") == BATCH
    again.close()


def test_processes_that_open_an_empty_place_at_once_all_succeed(empty_url: str) -> None:
    openers = [start_opener(empty_url) for _ in range(3)]
    for opener in openers:
        let_go(opener)
    assert {finish(opener).split()[0] for opener in openers} == {"0"}

    store = open_store(empty_url)
    store.batches.add(BATCH)
    assert len(store.batches.list().data) == 1
    store.close()


def test_an_opener_waits_while_another_process_makes_the_file(tmp_path: Path) -> None:
    with FileLock(tmp_path / "batches.db.lock"):
        opener = start_opener(f"sqlite:///{tmp_path / 'batches.db'}")
        let_go(opener)
        with pytest.raises(subprocess.TimeoutExpired):
            opener.wait(1.5)  # several times what it takes alone
        assert not (tmp_path / "batches.db").exists()
    assert finish(opener).split()[0] == "0"


def test_an_opener_waits_while_another_process_makes_the_tables(empty_postgres_url: str) -> None:
    engine = create_engine(empty_postgres_url)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        opener = start_opener(empty_postgres_url)
        let_go(opener)
        waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        while not connection.execute(waiting).scalar_one():
            assert opener.poll() is None
            time.sleep(0.02)
    engine.dispose()
    assert finish(opener).split()[0] == "0"


def test_a_current_store_opens_without_alembic(sql_url: str) -> None:
    """Importing it takes longer than everything else that a short command does."""
    opener = start_opener(sql_url)
    let_go(opener)
    assert finish(opener) == "0 False"


def test_the_migrations_make_the_tables_of_the_schema(sql_url: str) -> None:
    engine = create_engine(sql_url)
    with engine.connect() as connection:
        options = {"version_table": schema.VERSION_TABLE, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, schema.metadata) == []
        names = {index["name"] for table in schema.metadata.tables for index in inspect(connection).get_indexes(table)}
        assert {str(index.name) for table in schema.metadata.tables.values() for index in table.indexes} <= names
    engine.dispose()


def test_the_head_that_opening_looks_for_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [schema.HEAD]


def test_a_store_of_a_newer_release_is_refused(empty_url: str) -> None:
    open_store(empty_url).close()
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
    engine.dispose()

    with pytest.raises(ConfigurationError, match=r"revision 9999.*install the release"):
        open_store(empty_url)


def test_a_copy_without_wal_gets_it_back(sqlite_url: str) -> None:
    path = sqlite_url.removeprefix("sqlite:///")
    assert journal_mode(path, "PRAGMA journal_mode = DELETE") == "delete"
    open_store(sqlite_url).close()
    assert journal_mode(path, "PRAGMA journal_mode") == "wal"


def journal_mode(path: str, statement: str) -> str:
    connection = sqlite3.connect(path)
    mode: str = connection.execute(statement).fetchone()[0]
    connection.close()
    return mode


@pytest.mark.parametrize("url", ["", "batches.db", "mysql://host/db", "sqlite://", "sqlite:///:memory:"])
def test_another_kind_of_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="sqlite:///<path"):
        open_store(url)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "batches.db").write_bytes(b"This is not a database. " * 50)
    with pytest.raises(StorageFailure, match=r"batches\.db could not be used: file is not a database"):
        open_store(f"sqlite:///{tmp_path / 'batches.db'}")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(StorageFailure, match="home"):
        open_store(f"sqlite:///{tmp_path / 'home' / 'batches.db'}")


def test_an_unreachable_server_is_named_without_its_password() -> None:
    with pytest.raises(StorageFailure, match="POSTGRES_HOST") as failure:
        open_store("postgresql://vllm:hunter2@127.0.0.1:1/batches")
    assert "hunter2" not in str(failure.value)
