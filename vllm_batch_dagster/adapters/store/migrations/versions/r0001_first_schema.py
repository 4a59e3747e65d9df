"""The first schema: files, batches, chunks, attempts and the outbox.

Frozen: a migration says what a table was at its time, so it repeats schema.py instead of importing it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_NEEDS_ATTENTION = "status NOT IN ('failed', 'completed', 'expired', 'cancelled') OR result_version <> merged_version"
_NOT_PURGED = "purged_at IS NULL"
_NOT_PLANNED = "planned_version IS NULL OR planned_version <> version"
_NOT_DELIVERED = "state <> 'delivered'"
_PENDING = "state = 'pending'"


def upgrade() -> None:
    _create_files()
    _create_batches()
    _create_chunks()
    _create_attempts()
    _create_events()
    _create_deliveries()
    _create_keys()
    _create_claims()
    _create_uploads()
    _create_pauses()
    _create_webhooks()


def downgrade() -> None:
    op.drop_table("pauses")
    op.drop_table("deliveries")
    for table in ("upload_parts", "uploads", "claims", "keys", "events", "attempts", "chunks", "batches", "files"):
        op.drop_table(table)
    for table in ("webhook_secrets", "webhook_endpoints"):
        op.drop_table(table)


def _numbers(*names: str, nullable: bool = False) -> list[sa.Column[int]]:
    return [sa.Column(name, _Number, nullable=nullable) for name in names]


def _texts(*names: str, nullable: bool = False) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=nullable) for name in names]


def _sequence(table: str) -> tuple[sa.Column[int], sa.PrimaryKeyConstraint]:
    return sa.Column("seq", _Number, autoincrement=True), sa.PrimaryKeyConstraint("seq", name=f"{table}_pkey")


def _create_files() -> None:
    op.create_table(
        "files",
        *_sequence("files"),
        *_texts("id", "filename", "purpose", "sha256", "project_id"),
        *_numbers("bytes", "created_at"),
        *_numbers("expires_at", nullable=True),
        sa.UniqueConstraint("id", name="files_id_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("files_by_time", "files", ["created_at", "seq"])
    op.create_index("files_by_project", "files", ["project_id", "created_at", "seq"])
    op.create_index("files_by_purpose", "files", ["project_id", "purpose", "created_at", "seq"])


def _create_batches() -> None:
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled", "purged")
    op.create_table(
        "batches",
        *_sequence("batches"),
        *_texts("id", "input_file_id", "endpoint", "completion_window", "status", "errors", "project_id"),
        *_texts("metadata", "model", "usage", "repairs", "output_file_id", "error_file_id", nullable=True),
        *_numbers("created_at", "expires_at", "total", "completed", "failed", "result_version", "merged_version"),
        *_numbers("rejected"),
        *_numbers("output_expires_after", *(f"{name}_at" for name in times), nullable=True),
        sa.UniqueConstraint("id", name="batches_id_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("batches_by_time", "batches", ["created_at", "seq"])
    op.create_index("batches_by_project", "batches", ["project_id", "created_at", "seq"])
    op.create_index(
        "batches_needing_attention",
        "batches",
        ["created_at", "seq"],
        sqlite_where=sa.text(_NEEDS_ATTENTION),
        postgresql_where=sa.text(_NEEDS_ATTENTION),
    )
    unpurged = sa.text(_NOT_PURGED)
    op.create_index("batches_not_purged", "batches", ["id"], sqlite_where=unpurged, postgresql_where=unpurged)


def _create_chunks() -> None:
    op.create_table(
        "chunks",
        sa.Column("batch_id", sa.Text, nullable=False),
        sa.Column("idx", sa.Integer, nullable=False, autoincrement=False),
        *_numbers("first_line", "line_count", "offset", "length", "completed", "failed"),
        *_numbers("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens"),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("base_epoch", sa.Integer, nullable=False),
        sa.Column("published_epoch", sa.Integer, nullable=False),
        sa.Column("engine_failures", sa.Integer, nullable=False),
        *_texts("model", "summary", nullable=True),
        sa.PrimaryKeyConstraint("batch_id", "idx", name="chunks_pkey"),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="chunks_batch_id_fkey"),
    )


def _create_attempts() -> None:
    op.create_table(
        "attempts",
        sa.Column("batch_id", sa.Text, nullable=False),
        sa.Column("idx", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("epoch", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("base_epoch", sa.Integer, nullable=False),
        *_texts("run_id"),
        *_numbers("begun_at"),
        *_numbers("ended_at", nullable=True),
        *_texts("outcome", nullable=True),
        sa.PrimaryKeyConstraint("batch_id", "idx", "epoch", name="attempts_pkey"),
        sa.ForeignKeyConstraint(
            ["batch_id", "idx"], ["chunks.batch_id", "chunks.idx"], name="attempts_batch_id_idx_fkey"
        ),
    )


def _create_events() -> None:
    op.create_table(
        "events",
        *_sequence("events"),
        *_texts("id", "batch_id", "type"),
        *_numbers("created_at", "version"),
        *_numbers("planned_version", nullable=True),
        sa.UniqueConstraint("id", name="events_id_key"),
        sa.UniqueConstraint("batch_id", "type", name="events_batch_id_type_key"),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="events_batch_id_fkey"),
        sqlite_autoincrement=True,
    )
    unplanned = sa.text(_NOT_PLANNED)
    op.create_index("events_not_planned", "events", ["seq"], sqlite_where=unplanned, postgresql_where=unplanned)


def _create_deliveries() -> None:
    op.create_table(
        "deliveries",
        *_sequence("deliveries"),
        *_texts("id", "batch_id", "event_id", "target", "project_id", "state"),
        *_numbers("created_at", "since", "next_attempt_at", "version"),
        sa.Column("attempts", sa.Integer, nullable=False),
        *_texts("claimed_by", "last_error", nullable=True),
        *_numbers("delivered_at", nullable=True),
        sa.UniqueConstraint("id", name="deliveries_id_key"),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="deliveries_batch_id_fkey"),
        sa.ForeignKeyConstraint(["event_id"], ["events.id"], name="deliveries_event_id_fkey"),
        sqlite_autoincrement=True,
    )
    op.create_index("deliveries_by_batch", "deliveries", ["batch_id", "seq"])
    for name, column, text in (
        ("deliveries_pending", "next_attempt_at", _PENDING),
        ("deliveries_not_delivered", "seq", _NOT_DELIVERED),
    ):
        where = sa.text(text)
        op.create_index(name, "deliveries", [column], sqlite_where=where, postgresql_where=where)


def _create_keys() -> None:
    op.create_table(
        "keys",
        *_sequence("keys"),
        *_texts("id", "project_id", "hash", "label"),
        *_numbers("created_at"),
        *_numbers("revoked_at", "last_used_at", nullable=True),
        sa.UniqueConstraint("id", name="keys_id_key"),
        sa.UniqueConstraint("hash", name="keys_hash_key"),
        sqlite_autoincrement=True,
    )


def _create_claims() -> None:
    op.create_table(
        "claims",
        *_texts("project_id", "operation", "key", "fingerprint", "object_id"),
        *_numbers("created_at"),
        sa.PrimaryKeyConstraint("project_id", "operation", "key", name="claims_pkey"),
    )
    op.create_index("claims_by_time", "claims", ["created_at"])
    op.create_index("claims_by_object", "claims", ["object_id"])


def _create_uploads() -> None:
    op.create_table(
        "uploads",
        *_sequence("uploads"),
        *_texts("id", "filename", "purpose", "mime_type", "status", "part_ids", "project_id"),
        *_texts("file_id", "md5", nullable=True),
        *_numbers("bytes", "created_at", "expires_at"),
        *_numbers("expires_after", nullable=True),
        sa.UniqueConstraint("id", name="uploads_id_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("uploads_by_time", "uploads", ["created_at", "seq"])
    op.create_table(
        "upload_parts",
        *_sequence("upload_parts"),
        *_texts("id", "upload_id"),
        *_numbers("bytes", "created_at"),
        sa.UniqueConstraint("id", name="upload_parts_id_key"),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"], name="upload_parts_upload_id_fkey"),
        sqlite_autoincrement=True,
    )
    op.create_index("upload_parts_by_upload", "upload_parts", ["upload_id", "seq"])


def _create_webhooks() -> None:
    op.create_table(
        "webhook_endpoints",
        *_sequence("webhook_endpoints"),
        *_texts("id", "project_id", "name", "url", "event_types", "secret"),
        *_texts("old_secret", nullable=True),
        *_numbers("old_secret_until", nullable=True),
        *_numbers("created_at", "updated_at"),
        sa.UniqueConstraint("id", name="webhook_endpoints_id_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("webhook_endpoints_by_project", "webhook_endpoints", ["project_id", "created_at", "seq"])
    op.create_table(
        "webhook_secrets",
        *_texts("project_id", "secret"),
        *_texts("old_secret", nullable=True),
        *_numbers("old_secret_until", nullable=True),
        sa.PrimaryKeyConstraint("project_id", name="webhook_secrets_pkey"),
    )


def _create_pauses() -> None:
    op.create_table(
        "pauses",
        *_texts("scope", "cause", "reason"),
        *_numbers("since"),
        *_numbers("until", nullable=True),
        sa.Column("strikes", sa.Integer, nullable=False),
        *_texts("mark"),
        sa.PrimaryKeyConstraint("scope", "cause", name="pauses_pkey"),
    )
