"""The tables of the handler `postgres`, made and changed by numbered steps. Used by postgres.py before it writes.

A step that was released is never changed; a new one goes to the end. What has been applied stands in `schema_version`.
"""

from typing import TYPE_CHECKING, Any, LiteralString

from handlers.base import DeliveryFailed

if TYPE_CHECKING:
    import psycopg

_LOCK = 0x766C6C6D  # any number that others are unlikely to take: "vllm"

STEPS: tuple[LiteralString, ...] = (
    """
    CREATE TABLE {schema}.deliveries (
        batch_id text PRIMARY KEY,
        version bigint NOT NULL,
        delivery_key text NOT NULL,
        project_id text NOT NULL,
        endpoint text NOT NULL,
        model text,
        status text NOT NULL,
        answered bigint NOT NULL,
        failed bigint NOT NULL,
        metadata jsonb NOT NULL,
        delivered_at timestamptz NOT NULL
    );
    CREATE TABLE {schema}.results (
        batch_id text NOT NULL,
        custom_id text NOT NULL,
        version bigint NOT NULL,
        project_id text NOT NULL,
        endpoint text NOT NULL,
        model text,
        status text NOT NULL CHECK (status IN ('answered', 'failed')),
        status_code integer,
        request_id text,
        answer text,
        finish_reason text,
        input_tokens bigint,
        output_tokens bigint,
        error_code text,
        error_message text,
        response jsonb,
        error jsonb,
        metadata jsonb NOT NULL,
        is_altered boolean NOT NULL,
        delivered_at timestamptz NOT NULL,
        PRIMARY KEY (batch_id, custom_id)
    );
    """,
)


def migrate(connection: "psycopg.Connection[Any]", schema: str) -> None:
    """Bring the tables to the newest step; does nothing when they are there. Safe to call from several processes.

    Raises DeliveryFailed when a newer program made them: that one's next attempt works.
    """
    from psycopg import sql

    name = sql.Identifier(schema)
    if _applied(connection, schema) == len(STEPS):
        return
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        if not _exists(connection, schema):  # the command itself asks for a right that is not needed when it is there
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(name))
        connection.execute(
            sql.SQL(
                "CREATE TABLE IF NOT EXISTS {}.schema_version"
                " (version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
            ).format(name)
        )
        applied = _applied(connection, schema)
        if applied > len(STEPS):
            raise DeliveryFailed(f"the tables in {schema} are of version {applied}, this program knows {len(STEPS)}")
        for number, step in enumerate(STEPS[applied:], start=applied + 1):
            connection.execute(sql.SQL(step).format(schema=name))
            connection.execute(sql.SQL("INSERT INTO {}.schema_version (version) VALUES (%s)").format(name), (number,))


def _exists(connection: "psycopg.Connection[Any]", schema: str) -> bool:
    return connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (schema,)).fetchone() is not None


def _applied(connection: "psycopg.Connection[Any]", schema: str) -> int:
    """Return the number of the last step that was applied, 0 for none."""
    from psycopg import sql

    table = sql.Identifier(schema, "schema_version").as_string(connection)
    found = connection.execute("SELECT to_regclass(%s)", (table,)).fetchone()
    if found is None or found[0] is None:
        return 0
    row = connection.execute(sql.SQL("SELECT coalesce(max(version), 0) FROM {}").format(sql.SQL(table))).fetchone()
    return int(row[0]) if row else 0
