"""The tables of the batch store. `migrations/` creates them; a contract test compares the two.

Documents (metadata, errors, usage, summary) are JSON in text columns. Booleans, arrays and vendor types are avoided,
so that SQLite and PostgreSQL behave alike.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

# The newest revision in migrations/versions, known here so that opening a current store imports no Alembic (0.6 s).
HEAD = "0001"
# Not Alembic's default name: Dagster keeps its own `alembic_version`, and both may live in one database.
VERSION_TABLE = "batch_store_version"

# Written out with literals, since a planner uses a partial index only for a condition that it can recognise.
NEEDS_ATTENTION = "status NOT IN ('failed', 'completed', 'expired', 'cancelled') OR result_version <> merged_version"

_naming = {
    "ix": "%(table_name)s_%(column_0_N_name)s",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "pk": "%(table_name)s_pkey",
}
metadata = MetaData(naming_convention=_naming)

_Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only an INTEGER PRIMARY KEY


def _sequence() -> Column[int]:
    """Insertion order: breaks ties of `created_at` and is never used twice."""
    return Column("seq", _Number, primary_key=True, autoincrement=True)


files = Table(
    "files",
    metadata,
    _sequence(),
    Column("id", Text, nullable=False, unique=True),
    Column("bytes", _Number, nullable=False),
    Column("created_at", _Number, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("expires_at", _Number),
    Index("files_by_time", "created_at", "seq"),
    Index("files_by_purpose", "purpose", "created_at", "seq"),
    sqlite_autoincrement=True,
)

# `completed`, `failed` and `usage` hold for a terminal batch; of an open one they are the sums over its chunks.
batches = Table(
    "batches",
    metadata,
    _sequence(),
    Column("id", Text, nullable=False, unique=True),
    Column("input_file_id", Text, nullable=False),  # no foreign key: the file may be unknown, or deleted later
    Column("endpoint", Text, nullable=False),
    Column("completion_window", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_at", _Number, nullable=False),
    Column("expires_at", _Number, nullable=False),
    Column("metadata", Text),
    Column("output_expires_after", _Number),
    Column("model", Text),
    Column("errors", Text, nullable=False),
    Column("total", _Number, nullable=False),
    Column("completed", _Number, nullable=False),
    Column("failed", _Number, nullable=False),
    Column("usage", Text),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    Column("in_progress_at", _Number),
    Column("finalizing_at", _Number),
    Column("completed_at", _Number),
    Column("failed_at", _Number),
    Column("expired_at", _Number),
    Column("cancelling_at", _Number),
    Column("cancelled_at", _Number),
    Column("result_version", _Number, nullable=False),
    Column("merged_version", _Number, nullable=False),
    Index("batches_by_time", "created_at", "seq"),
    Index(
        "batches_needing_attention",
        "created_at",
        "seq",
        sqlite_where=text(NEEDS_ATTENTION),
        postgresql_where=text(NEEDS_ATTENTION),
    ),
    sqlite_autoincrement=True,
)

chunks = Table(
    "chunks",
    metadata,
    Column("batch_id", Text, ForeignKey("batches.id"), primary_key=True),
    Column("idx", Integer, primary_key=True, autoincrement=False),
    Column("first_line", _Number, nullable=False),
    Column("line_count", _Number, nullable=False),
    Column("offset", _Number, nullable=False),
    Column("length", _Number, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("base_epoch", Integer, nullable=False),
    Column("published_epoch", Integer, nullable=False),
    Column("engine_failures", Integer, nullable=False),
    Column("completed", _Number, nullable=False),
    Column("failed", _Number, nullable=False),
    Column("input_tokens", _Number, nullable=False),
    Column("cached_tokens", _Number, nullable=False),
    Column("output_tokens", _Number, nullable=False),
    Column("reasoning_tokens", _Number, nullable=False),
    Column("summary", Text),
)

attempts = Table(
    "attempts",
    metadata,
    Column("batch_id", Text, primary_key=True),
    Column("idx", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("base_epoch", Integer, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("begun_at", _Number, nullable=False),
    Column("ended_at", _Number),
    Column("outcome", Text),
    ForeignKeyConstraint(["batch_id", "idx"], ["chunks.batch_id", "chunks.idx"]),
)

# The outbox: written in the transaction that ends a batch, read by deliveries.
events = Table(
    "events",
    metadata,
    _sequence(),
    Column("id", Text, nullable=False, unique=True),
    Column("batch_id", Text, ForeignKey("batches.id"), nullable=False),
    Column("type", Text, nullable=False),
    Column("created_at", _Number, nullable=False),
    UniqueConstraint("batch_id", "type"),
    sqlite_autoincrement=True,
)
