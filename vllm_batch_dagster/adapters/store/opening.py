"""Opens the batch store: creates the folder, and creates or upgrades the schema when it is not the current one.

Called by the composition root in every process that needs the store, at any time and in any number at once.
"""

from pathlib import Path

from sqlalchemy import Connection, inspect, text

from vllm_batch_dagster.adapters.store.database import BUSY_SECONDS, Database, read_url
from vllm_batch_dagster.adapters.store.schema import HEAD, VERSION_TABLE
from vllm_batch_dagster.adapters.store.sql_store import SqlStore
from vllm_batch_dagster.core.errors import ConfigurationError, StorageFailure
from vllm_batch_dagster.stages.publication import make_folder

# Any constant will do: advisory locks are numbers, per database.
ADVISORY_LOCK = 0x7661_6C6C_6D62


def open_store(url: str) -> SqlStore:
    """Open the store at `url`: sqlite:///<path> or postgresql://...

    Raises ConfigurationError for another kind of URL or a store written by a newer release, StorageFailure when the
    database cannot be reached or created.
    """
    database = Database(read_url(url))
    try:
        _prepare(database)
    except BaseException:
        database.close()
        raise
    return SqlStore(database)


def _prepare(database: Database) -> None:
    path = database.sqlite_path
    if path is None:
        _prepare_postgres(database)
    elif not (path.exists() and _is_ready_sqlite(database)):
        _prepare_sqlite(database, path)


def _prepare_postgres(database: Database) -> None:
    with database.reading() as connection:
        if _revision(connection) == HEAD:
            return
    with database.writing() as connection:
        # Released with the transaction, or with the connection of a process that dies.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        _upgrade(connection)


def _is_ready_sqlite(database: Database) -> bool:
    with database.reading() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
        return bool(mode == "wal" and _revision(connection) == HEAD)


def _prepare_sqlite(database: Database, path: Path) -> None:
    """Create or upgrade the file under a lock: two processes that turn on WAL at once would fail each other."""
    from filelock import FileLock, Timeout

    make_folder(path.parent)
    lock = path.with_name(path.name + ".lock")
    try:
        with FileLock(lock, timeout=4 * BUSY_SECONDS, fallback_to_soft=False):
            database.enable_wal()
            with database.writing() as connection:
                _upgrade(connection)
    except Timeout:
        raise StorageFailure(f"{lock} is held by another process that upgrades the store; wait for its end") from None
    except OSError as error:
        raise StorageFailure(f"{lock} could not be locked: {error.strerror}. Check its permissions.") from error


def _revision(connection: Connection) -> str | None:
    """Return the schema's revision, None when there is no schema."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    revision: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return revision


def _upgrade(connection: Connection) -> None:
    """Bring the schema to HEAD in the caller's transaction. Another process may have done it meanwhile."""
    found = _revision(connection)
    if found == HEAD:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigurationError(
            f"the batch store has the schema revision {found}, which this release does not know ({error}): "
            "install the release that wrote it, or a newer one"
        ) from error
