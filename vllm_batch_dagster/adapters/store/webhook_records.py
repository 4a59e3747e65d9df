"""Webhook endpoints and signing secrets. A change reads and writes in one transaction, so that none is lost."""

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.paging import fetch_page, within
from vllm_batch_dagster.adapters.store.schema import webhook_endpoints as endpoints
from vllm_batch_dagster.adapters.store.schema import webhook_secrets
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import Page
from vllm_batch_dagster.core.webhooks import (
    ENDPOINT_KIND,
    EndpointParams,
    SigningSecret,
    WebhookEndpoint,
    change_endpoint,
    rotate_endpoint,
)


class SqlWebhookRecords:
    """See WebhookRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, endpoint: WebhookEndpoint) -> None:
        with self._database.writing() as connection:
            try:
                connection.execute(insert(endpoints), _endpoint_row(endpoint))
            except IntegrityError:
                raise StateConflict(f"a webhook endpoint with this id exists already: {endpoint.id}") from None

    def get(self, endpoint_id: str, *, project_id: str | None = None) -> WebhookEndpoint:
        with self._database.reading() as connection:
            return _fetch(connection, endpoint_id, project_id)

    def list(
        self, *, after: str | None = None, limit: int = 20, project_id: str | None = None
    ) -> Page[WebhookEndpoint]:
        with self._database.reading() as connection:
            rows = fetch_page(
                connection,
                select(endpoints),
                endpoints,
                kind=ENDPOINT_KIND,
                after=after,
                limit=limit,
                descending=True,
                project_id=project_id,
            )
        return Page(tuple(map(_read, rows.data)), rows.has_more)

    def listening(self, project_id: str, event_type: str) -> Sequence[WebhookEndpoint]:
        query = within(select(endpoints), endpoints, project_id).order_by(endpoints.c.created_at, endpoints.c.seq)
        with self._database.reading() as connection:
            found = [_read(row) for row in connection.execute(query).mappings()]
        return [endpoint for endpoint in found if event_type in endpoint.event_types]

    def change(self, endpoint_id: str, changes: EndpointParams, now: int) -> WebhookEndpoint:
        with self._database.writing() as connection:
            old = _fetch(connection, endpoint_id, lock=True)
            return _store(connection, change_endpoint(old, changes, now))

    def rotate(self, endpoint_id: str, new: str, now: int, *, keep_old: bool) -> WebhookEndpoint:
        with self._database.writing() as connection:
            old = _fetch(connection, endpoint_id, lock=True)
            return _store(connection, rotate_endpoint(old, new, now, keep_old=keep_old))

    def delete(self, endpoint_id: str) -> None:
        with self._database.writing() as connection:
            if not connection.execute(delete(endpoints).where(endpoints.c.id == endpoint_id)).rowcount:
                raise NotFound(ENDPOINT_KIND, endpoint_id)

    def project_secret(self, project_id: str, new: str) -> SigningSecret:
        with self._database.reading() as connection:
            known = _fetch_secret(connection, project_id)
        if known is not None:
            return known
        with self._database.writing() as connection:
            return _first_secret(connection, project_id, new)

    def rotate_project_secret(self, project_id: str, new: str, now: int, *, keep_old: bool) -> SigningSecret:
        mine = webhook_secrets.c.project_id == project_id
        with self._database.writing() as connection:
            known = _first_secret(connection, project_id, new)
            if known.current == new:
                return known
            rotated = known.rotated(new, now, keep_old=keep_old)
            connection.execute(update(webhook_secrets).where(mine).values(_secret_columns(rotated)))
            return rotated


def _first_secret(connection: Connection, project_id: str, new: str) -> SigningSecret:
    """Return the secret of a project, which is `new` if it has none. Its row is locked afterwards."""
    insert_one = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    row = {"project_id": project_id, **_secret_columns(SigningSecret(new))}
    connection.execute(insert_one(webhook_secrets).values(row).on_conflict_do_nothing())
    known = _fetch_secret(connection, project_id, lock=True)
    assert known is not None  # rows of this table are never deleted
    return known


def _fetch_secret(connection: Connection, project_id: str, *, lock: bool = False) -> SigningSecret | None:
    query = select(webhook_secrets).where(webhook_secrets.c.project_id == project_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()
    return None if row is None else _read_secret(row)


def _fetch(
    connection: Connection, endpoint_id: str, project_id: str | None = None, *, lock: bool = False
) -> WebhookEndpoint:
    query = within(select(endpoints).where(endpoints.c.id == endpoint_id), endpoints, project_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()
    if row is None:
        raise NotFound(ENDPOINT_KIND, endpoint_id)
    return _read(row)


def _store(connection: Connection, endpoint: WebhookEndpoint) -> WebhookEndpoint:
    mine = endpoints.c.id == endpoint.id
    connection.execute(update(endpoints).where(mine).values(_endpoint_row(endpoint)))
    return endpoint


def _endpoint_row(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "project_id": endpoint.project_id,
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": msgspec.json.encode(endpoint.event_types).decode(),
        "created_at": endpoint.created_at,
        "updated_at": endpoint.updated_at,
        **_secret_columns(endpoint.secret),
    }


def _secret_columns(secret: SigningSecret) -> dict[str, Any]:
    return {"secret": secret.current, "old_secret": secret.old, "old_secret_until": secret.old_until}


def _read(row: RowMapping) -> WebhookEndpoint:
    return WebhookEndpoint(
        id=row["id"],
        project_id=row["project_id"],
        name=row["name"],
        url=row["url"],
        event_types=msgspec.json.decode(row["event_types"], type=tuple[str, ...]),
        secret=_read_secret(row),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def _read_secret(row: RowMapping) -> SigningSecret:
    return SigningSecret(row["secret"], row["old_secret"], row["old_secret_until"])
