"""Pages of a listing by (created_at, insertion), for the file and the batch table. Both orders can use the index."""

from typing import Any

from sqlalchemy import Connection, RowMapping, Select, Table, select, tuple_

from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import Page


def fetch_page(
    connection: Connection,
    query: Select[Any],
    table: Table,
    *,
    kind: str,
    after: str | None,
    limit: int,
    descending: bool,
    project_id: str | None = None,
) -> Page[RowMapping]:
    """Return up to `limit` rows of `query` over `table` behind the row `after`, all of one project if one is given.

    Raises NotFound(`kind`, after) for an unknown one.
    """
    place = tuple_(table.c.created_at, table.c.seq)
    if after is not None:
        cursor = _find_place(connection, table, kind, after, project_id)
        query = query.where(place < cursor if descending else place > cursor)
    order = [column.desc() if descending else column.asc() for column in (table.c.created_at, table.c.seq)]
    ordered = within(query, table, project_id).order_by(*order)
    rows = connection.execute(ordered.limit(limit + 1)).mappings().all()
    return Page(tuple(rows[:limit]), has_more=len(rows) > limit)


def within(query: Select[Any], table: Table, project_id: str | None) -> Select[Any]:
    """Return `query` narrowed to the rows of one project; None: all projects."""
    return query if project_id is None else query.where(table.c.project_id == project_id)


def _find_place(connection: Connection, table: Table, kind: str, object_id: str, project_id: str | None) -> Any:
    query = select(table.c.created_at, table.c.seq).where(table.c.id == object_id)
    row = connection.execute(within(query, table, project_id)).one_or_none()
    if row is None:
        raise NotFound(kind, object_id)
    return tuple_(*row)
