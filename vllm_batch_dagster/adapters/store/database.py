"""Connections to the batch store's database: SQLite or PostgreSQL, with what makes each durable and free of deadlocks.

Every record class works through `Database.reading` and `Database.writing`; each block is one transaction.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from vllm_batch_dagster.core.errors import ConfigurationError, StorageFailure

BUSY_SECONDS = 30
# Kept open by a process: many threads of the API read at once, and opening one takes as long as ten reads.
SQLITE_CONNECTIONS = 20
_BEGIN = "sqlite_begin"


class Database:
    """A pool of connections. Safe to use from many threads; a process that forks must open its own."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self._engine = _sqlite_engine(url) if self.sqlite_path else _postgres_engine(url)
        # A reader sees one state: SQLite's transactions are so by nature, PostgreSQL's when told.
        level = {} if self.sqlite_path else {"isolation_level": "REPEATABLE READ"}
        self._reader = self._engine.execution_options(**level)
        self._writer = self._engine.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"})

    @property
    def sqlite_path(self) -> Path | None:
        """The database file, or None for PostgreSQL."""
        return Path(self.url.database or "") if self.url.get_backend_name() == "sqlite" else None

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One transaction that sees one state of the store. Raises StorageFailure."""
        with self._explained(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction, durable when the block ends, undone when it raises.

        On SQLite it takes the write lock at once: a read lock that is raised later can fail at any moment.
        Raises StorageFailure.
        """
        with self._explained(), self._writer.begin() as connection:
            yield connection

    def enable_wal(self) -> None:
        """Let readers of SQLite go on while somebody writes. Stored in the file. Raises StorageFailure."""
        # No transaction may be open, so this one begins with nothing.
        outside = self._engine.execution_options(**{_BEGIN: ""})
        with self._explained(), outside.begin() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the driver raises into a StorageFailure that says where and how to mend it."""
        try:
            yield
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip()
            raise StorageFailure(f"{self._place} could not be used: {reason}. {self._mend}") from error

    @property
    def _place(self) -> str:
        return f"the batch store {self.url.render_as_string(hide_password=True)}"

    @property
    def _mend(self) -> str:
        if self.sqlite_path:
            return "Check the free space and the permissions of its folder."
        return "Check that PostgreSQL runs and that POSTGRES_HOST, _PORT, _DB, _USER and _PASSWORD are right."


def read_url(text: str) -> URL:
    """Return the URL of a SQLite file or of PostgreSQL through psycopg 3. Raises ConfigurationError."""
    try:
        url = make_url(text)
    except ArgumentError:
        raise ConfigurationError(
            "the URL of the batch store cannot be read; write sqlite:///<path> or set POSTGRES_HOST"
        ) from None
    backend = url.get_backend_name()
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and url.database and url.database != ":memory:":
        return url.set(drivername="sqlite")
    raise ConfigurationError(
        f"the batch store cannot be {url.render_as_string(hide_password=True)}: "
        "write sqlite:///<path of a file> or postgresql://<user>@<host>/<database>"
    )


# `hide_parameters`: an error must not carry the users' metadata into a log.
def _postgres_engine(url: URL) -> Engine:
    return create_engine(url, hide_parameters=True, pool_pre_ping=True)


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(
        url,
        hide_parameters=True,
        connect_args={"timeout": BUSY_SECONDS},
        pool_size=SQLITE_CONNECTIONS,
        pool_use_lifo=True,  # the connections that are needed seldom are those of a burst
    )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; `_begin_sqlite` does
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    statement = connection.get_execution_options().get(_BEGIN, "BEGIN")
    if statement:
        connection.exec_driver_sql(statement)
