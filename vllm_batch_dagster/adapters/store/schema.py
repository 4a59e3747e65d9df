"""The tables of the batch store. `migrations/` creates them; a contract test compares the two.

Documents (metadata, errors, usage, repairs, summary) are JSON in text columns. Booleans, arrays and vendor types are
avoided, so that SQLite and PostgreSQL behave alike.
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
NOT_PURGED = "purged_at IS NULL"
NOT_PLANNED = "planned_version IS NULL OR planned_version <> version"
NOT_DELIVERED = "state <> 'delivered'"
PENDING = "state = 'pending'"

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
    Column("project_id", Text, nullable=False),
    Index("files_by_time", "created_at", "seq"),
    Index("files_by_project", "project_id", "created_at", "seq"),
    Index("files_by_purpose", "project_id", "purpose", "created_at", "seq"),
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
    Column("repairs", Text),
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
    Column("rejected", _Number, nullable=False),
    Column("purged_at", _Number),
    Column("project_id", Text, nullable=False),
    Index("batches_by_time", "created_at", "seq"),
    Index("batches_by_project", "project_id", "created_at", "seq"),
    Index(
        "batches_needing_attention",
        "created_at",
        "seq",
        sqlite_where=text(NEEDS_ATTENTION),
        postgresql_where=text(NEEDS_ATTENTION),
    ),
    Index("batches_not_purged", "id", sqlite_where=text(NOT_PURGED), postgresql_where=text(NOT_PURGED)),
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
    Column("model", Text),
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
    Column("version", _Number, nullable=False),
    Column("planned_version", _Number),
    UniqueConstraint("batch_id", "type"),
    Index("events_not_planned", "seq", sqlite_where=text(NOT_PLANNED), postgresql_where=text(NOT_PLANNED)),
    sqlite_autoincrement=True,
)

# An event on its way to one target. The id follows from event, target and version.
deliveries = Table(
    "deliveries",
    metadata,
    _sequence(),
    Column("id", Text, nullable=False, unique=True),
    Column("batch_id", Text, ForeignKey("batches.id"), nullable=False),
    Column("event_id", Text, ForeignKey("events.id"), nullable=False),
    Column("target", Text, nullable=False),
    Column("created_at", _Number, nullable=False),
    Column("since", _Number, nullable=False),
    Column("next_attempt_at", _Number, nullable=False),
    Column("version", _Number, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("claimed_by", Text),
    Column("last_error", Text),
    Column("delivered_at", _Number),
    Index("deliveries_by_batch", "batch_id", "seq"),
    Index("deliveries_pending", "next_attempt_at", sqlite_where=text(PENDING), postgresql_where=text(PENDING)),
    Index("deliveries_not_delivered", "seq", sqlite_where=text(NOT_DELIVERED), postgresql_where=text(NOT_DELIVERED)),
    sqlite_autoincrement=True,
)

# Files that arrive in parts. `file_id` of a pending one is what the newest attempt to complete it writes.
uploads = Table(
    "uploads",
    metadata,
    _sequence(),
    Column("id", Text, nullable=False, unique=True),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", _Number, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("created_at", _Number, nullable=False),
    Column("expires_at", _Number, nullable=False),
    Column("status", Text, nullable=False),
    Column("expires_after", _Number),
    Column("file_id", Text),
    Column("part_ids", Text, nullable=False),
    Column("md5", Text),
    Column("project_id", Text, nullable=False),
    Index("uploads_by_time", "created_at", "seq"),
    sqlite_autoincrement=True,
)

upload_parts = Table(
    "upload_parts",
    metadata,
    _sequence(),
    Column("id", Text, nullable=False, unique=True),
    Column("upload_id", Text, ForeignKey("uploads.id"), nullable=False),
    Column("bytes", _Number, nullable=False),
    Column("created_at", _Number, nullable=False),
    Index("upload_parts_by_upload", "upload_id", "seq"),
    sqlite_autoincrement=True,
)

# Bearer keys. A revoked one stays: the API never falls back to serving without keys.
keys = Table(
    "keys",
    metadata,
    _sequence(),
    Column("id", Text, nullable=False, unique=True),
    Column("project_id", Text, nullable=False),
    Column("hash", Text, nullable=False, unique=True),
    Column("label", Text, nullable=False),
    Column("created_at", _Number, nullable=False),
    Column("revoked_at", _Number),
    Column("last_used_at", _Number),
    sqlite_autoincrement=True,
)

# Why nothing new is sent, at most once for a scope and a cause. A breaker's row outlives its time: it has the strikes.
pauses = Table(
    "pauses",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("cause", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("since", _Number, nullable=False),
    Column("until", _Number),
    Column("strikes", Integer, nullable=False),
    Column("mark", Text, nullable=False),
)

# What an Idempotency-Key made. Written in the transaction that stores the object.
claims = Table(
    "claims",
    metadata,
    Column("project_id", Text, primary_key=True),
    Column("operation", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", Text, nullable=False),
    Column("object_id", Text, nullable=False),
    Column("created_at", _Number, nullable=False),
    Index("claims_by_time", "created_at"),
    Index("claims_by_object", "object_id"),
)

# Secrets are kept as they are: to sign with one, we must have it.
webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    _sequence(),
    Column("id", Text, nullable=False, unique=True),
    Column("project_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("event_types", Text, nullable=False),
    Column("secret", Text, nullable=False),
    Column("old_secret", Text),
    Column("old_secret_until", _Number),
    Column("created_at", _Number, nullable=False),
    Column("updated_at", _Number, nullable=False),
    Index("webhook_endpoints_by_project", "project_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

# What the deliveries to `metadata.webhook_url` are signed with.
webhook_secrets = Table(
    "webhook_secrets",
    metadata,
    Column("project_id", Text, primary_key=True),
    Column("secret", Text, nullable=False),
    Column("old_secret", Text),
    Column("old_secret_until", _Number),
)
