"""The handler `postgres`: one row for each line of a batch, in one transaction, upserted by (batch_id, custom_id).

Behind the merge on the data path. Rows stream through COPY into a temporary table, so memory is flat on our side, and
readers see all of a delivery or nothing. A delivery that comes again writes the same rows; one of older results than
those that stand there changes nothing.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, LiteralString

import msgspec

from handlers.base import Batch, Delivery, DeliveryFailed, Handler, Undeliverable
from handlers.postgres_schema import migrate
from handlers.postgres_values import fit_json, fit_text
from handlers.rows import ANSWERED, FAILED, ResultRow, read_rows
from handlers.settings import HandlerSettings
from vllm_batch_dagster.core.errors import ConfigurationError

if TYPE_CHECKING:
    import psycopg

CONNECT_SECONDS = 10
LOCK_SECONDS = 20  # longest wait for a lock in the transaction of a delivery
# Of a line, in the order of `_values`; the others are the same for the whole delivery.
COLUMNS: tuple[LiteralString, ...] = (
    *("custom_id", "model", "status", "status_code", "request_id", "answer", "finish_reason", "input_tokens"),
    *("output_tokens", "error_code", "error_message", "response", "error", "is_altered"),
)
_STAGE: LiteralString = """
    CREATE TEMPORARY TABLE arriving ON COMMIT DROP AS
    SELECT {columns} FROM {schema}.results WITH NO DATA
"""
_UPSERT: LiteralString = """
    INSERT INTO {schema}.results (batch_id, version, project_id, endpoint, metadata, delivered_at, {columns})
    SELECT %(batch_id)s, %(version)s, %(project_id)s, %(endpoint)s, %(metadata)s::jsonb, now(), {columns} FROM arriving
    ON CONFLICT (batch_id, custom_id) DO UPDATE SET {changes}
"""
_FORGET: LiteralString = "DELETE FROM {schema}.results WHERE batch_id = %(batch_id)s AND version <> %(version)s"
_NOTE: LiteralString = """
    INSERT INTO {schema}.deliveries
        (batch_id, version, delivery_key, project_id, endpoint, model, status, answered, failed, metadata, delivered_at)
    VALUES (%(batch_id)s, %(version)s, %(key)s, %(project_id)s, %(endpoint)s, %(model)s, %(status)s, %(answered)s,
        %(failed)s, %(metadata)s::jsonb, now())
    ON CONFLICT (batch_id) DO UPDATE SET {changes}
"""
_NOTED: tuple[LiteralString, ...] = (
    *("version", "delivery_key", "project_id", "endpoint", "model", "status", "answered", "failed", "metadata"),
    "delivered_at",
)


class PostgresHandler(Handler):
    """See the module docstring. On when HANDLER_POSTGRES_DSN says where."""

    def __init__(self, settings: HandlerSettings | None = None) -> None:
        settings = settings or HandlerSettings()
        self._dsn, self._schema = settings.handler_postgres_dsn, settings.handler_postgres_schema

    def name(self) -> str:
        return "postgres"

    def enabled(self) -> bool:
        return bool(self._dsn.get_secret_value())

    def check(self) -> None:
        """Connect, and make the tables if they are not there."""
        with self._connect() as connection:
            migrate(connection, self._schema)

    def deliver(self, delivery: Delivery) -> None:
        with self._connect() as connection:
            migrate(connection, self._schema)
            with connection.transaction():
                if self._may_write(connection, delivery):
                    self._write(connection, delivery)

    @contextmanager
    def _connect(self) -> Iterator["psycopg.Connection[Any]"]:
        """Errors are told in PostgreSQL's first sentence only: its details quote the row, and a DSN its password."""
        import psycopg

        dsn = self._dsn.get_secret_value()
        try:
            password = psycopg.conninfo.conninfo_to_dict(dsn).get("password")
        except psycopg.ProgrammingError:
            raise ConfigurationError(
                "HANDLER_POSTGRES_DSN cannot be read; it is to look like postgresql://user:password@host:5432/database"
            ) from None
        try:
            with psycopg.connect(
                dsn, autocommit=True, connect_timeout=CONNECT_SECONDS, application_name="vllm-batch"
            ) as connection:
                yield connection
        except psycopg.errors.CardinalityViolation:
            raise Undeliverable("two lines of the batch have the same custom_id once U+0000 is replaced") from None
        except psycopg.DataError as error:  # a value that its column can never hold
            raise Undeliverable(_tell(error, str(password or ""))) from None
        except psycopg.Error as error:
            raise DeliveryFailed(_tell(error, str(password or ""))) from None

    def _may_write(self, connection: "psycopg.Connection[Any]", delivery: Delivery) -> bool:
        """Take the batch for this transaction; False when newer results stand there. Raises DeliveryFailed when
        another attempt is at it: one that was given up after its time goes on until its process ends. The server needs
        a moment to see that a process died."""
        import psycopg

        connection.execute("SELECT set_config('lock_timeout', %s, true)", (f"{LOCK_SECONDS}s",))
        lock = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"
        try:
            connection.execute(lock, (f"{self._schema}.{delivery.batch.id}",))
        except psycopg.errors.LockNotAvailable:
            raise DeliveryFailed(f"another attempt is writing {delivery.batch.id}") from None
        select = self._sql("SELECT version FROM {schema}.deliveries WHERE batch_id = %s")
        standing = connection.execute(select, (delivery.batch.id,)).fetchone()
        return standing is None or standing[0] <= delivery.version

    def _write(self, connection: "psycopg.Connection[Any]", delivery: Delivery) -> None:
        values = _batch_values(delivery)
        connection.execute(self._sql(_STAGE))
        counts = self._copy(connection, delivery)
        shared: tuple[LiteralString, ...] = ("version", "project_id", "endpoint", "metadata", "delivered_at")
        connection.execute(self._sql(_UPSERT, (*shared, *COLUMNS[1:])), values)
        connection.execute(self._sql(_FORGET), values)
        noted = {**values, "answered": counts[ANSWERED], "failed": counts[FAILED]}
        connection.execute(self._sql(_NOTE, _NOTED), noted)

    def _copy(self, connection: "psycopg.Connection[Any]", delivery: Delivery) -> Counter[str]:
        """Stream the lines into the temporary table; return how many were answered and failed."""
        counts: Counter[str] = Counter()
        with connection.cursor().copy(self._sql("COPY arriving ({columns}) FROM STDIN")) as copy:
            for row in read_rows(delivery):
                counts[row.status] += 1
                copy.write_row(_values(row))
        return counts

    def _sql(self, statement: LiteralString, changed: tuple[LiteralString, ...] = ()) -> "psycopg.sql.Composed":
        """Fill in the schema, the columns, and for an upsert the `changed` ones."""
        from psycopg import sql

        return sql.SQL(statement).format(
            schema=sql.Identifier(self._schema),
            columns=sql.SQL(", ").join(map(sql.Identifier, COLUMNS)),
            changes=sql.SQL(", ").join(sql.SQL(f"{column} = excluded.{column}") for column in changed),
        )


def _batch_values(delivery: Delivery) -> dict[str, Any]:
    batch: Batch = delivery.batch
    return {
        "batch_id": batch.id,
        "version": delivery.version,
        "key": delivery.key,
        "project_id": batch.project_id,
        "endpoint": batch.endpoint,
        "model": fit_text(batch.model),
        "status": batch.status.value,
        "metadata": fit_json(msgspec.json.encode(dict(batch.metadata or {}))),
    }


def _values(row: ResultRow) -> tuple[str | int | bool | None, ...]:
    """Return a line as COLUMNS; `is_altered` says whether a character had to be replaced."""
    texts = (row.custom_id, row.model, row.request_id, row.answer, row.finish_reason, row.error_code, row.error_message)
    custom_id, model, request_id, answer, reason, code, message = fitted = tuple(map(fit_text, texts))
    response, error = fit_json(row.response), fit_json(row.error)
    is_altered = fitted != texts or _is_changed(row.response, response) or _is_changed(row.error, error)
    return (
        *(custom_id, model, row.status, row.status_code, request_id, answer, reason, row.input_tokens),
        *(row.output_tokens, code, message, response, error, is_altered),
    )


def _is_changed(before: bytes | None, after: str | None) -> bool:
    return before is not None and after is not None and before != after.encode()


def _tell(error: "psycopg.Error", password: str) -> str:
    told = error.diag.message_primary or str(error).strip() or type(error).__name__
    told = told.replace(password, "********") if password else told
    return f"PostgreSQL: {told}" + (f" ({error.sqlstate})" if error.sqlstate else "")
