"""The results of a batch as one Parquet file, written row group by row group. Used by the handlers `parquet` and `s3`.

The columns and their types are fixed: FORMAT grows when they change. Memory is bounded by a row group, whatever the
size of the batch.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from handlers.base import Delivery
from handlers.rows import ResultRow, read_rows

if TYPE_CHECKING:
    import polars

    from handlers.buckets import Upload

FORMAT = 1
MOST_ROWS_PER_GROUP = 4096  # a power of two, as every smaller group
BYTES_PER_GROUP = 4 << 20
VERSION_KEY, FORMAT_KEY, DELIVERY_KEY = "results-version", "results-format", "delivery-key"

Schema = Mapping[str, "polars.DataType | type[polars.DataType]"]


def schema() -> Schema:
    """Return the columns, in order. The batch is the partition of the data set, and no column of the file."""
    import polars

    text, number = polars.String, polars.Int64
    return {
        "custom_id": text,
        "status": text,
        "status_code": polars.Int32,
        "endpoint": text,
        "model": text,
        "answer": text,
        "finish_reason": text,
        "input_tokens": number,
        "output_tokens": number,
        "error_code": text,
        "error_message": text,
        "request_id": text,
        "response": text,
        "error": text,
        "project_id": text,
        "version": number,
        "ended_at": polars.Datetime("us", "UTC"),
    }


def marks(delivery: Delivery) -> dict[str, str]:
    """Return what is noted with a file of this delivery, by which it is known again."""
    return {VERSION_KEY: str(delivery.version), FORMAT_KEY: str(FORMAT), DELIVERY_KEY: delivery.key}


def is_current(found: Mapping[str, str], delivery: Delivery) -> bool:
    """True when a file with these marks holds the results of `delivery`, or newer ones."""
    version = int(found.get(VERSION_KEY, "-1"))
    return version > delivery.version or (version == delivery.version and found.get(FORMAT_KEY) == str(FORMAT))


def write_parquet(delivery: Delivery, target: Path | IO[bytes] | Any) -> None:
    """Write the file; `target` needs no more than `write`. What reading or writing raises comes through, or as a
    PolarsError. Nothing of it is synced."""
    from polars.io.plugins import register_io_source

    rows_per_group = plan_groups(map(len, delivery.results.lines()))

    def groups(*_: object) -> Iterator["polars.DataFrame"]:
        return _groups(delivery, rows_per_group)

    rows = register_io_source(groups, schema=dict(schema()))
    rows.sink_parquet(
        target,
        compression="zstd",
        row_group_size=rows_per_group,
        maintain_order=True,
        metadata=marks(delivery),
        engine="streaming",
    )


def upload_parquet(delivery: Delivery, upload: "Upload") -> None:
    """Write the file into an object that is not committed yet. Raises DeliveryFailed as well."""
    try:
        write_parquet(delivery, upload)
    except Exception:
        if upload.failure is not None:  # polars makes an error of its own of what the write raised
            raise upload.failure from None
        raise


def read_marks(path: Path) -> Mapping[str, str]:
    """Return the marks of a file, none for what is no Parquet file."""
    import polars

    try:
        return polars.read_parquet_metadata(path)
    except polars.exceptions.PolarsError:
        return {}


def plan_groups(line_bytes: Iterable[int]) -> int:
    """Return how many rows make a row group of lines of these sizes, so that no group takes more than BYTES_PER_GROUP
    unless a single line does.

    polars cuts groups by rows alone and holds several of them; a line may have a megabyte. Of the sizes 4096, 2048, ...
    the largest is taken in which every group fits, wherever the long lines stand.
    """
    sizes = [MOST_ROWS_PER_GROUP >> step for step in range(MOST_ROWS_PER_GROUP.bit_length())]
    filled = [0] * len(sizes)
    best = 0
    for number, size in enumerate(line_bytes):
        for place in range(best, len(sizes)):
            starts = number % sizes[place] == 0
            filled[place] = size + (0 if starts else filled[place])
        while filled[best] > BYTES_PER_GROUP and best < len(sizes) - 1:
            best += 1
    return sizes[best]


def _groups(delivery: Delivery, rows_per_group: int) -> Iterator["polars.DataFrame"]:
    rest = _rest(delivery)
    rows = (_values(row, delivery.batch.endpoint, rest) for row in read_rows(delivery))
    while group := list(islice(rows, rows_per_group)):
        yield _frame(group)


def _frame(group: list[tuple[Any, ...]]) -> "polars.DataFrame":
    import polars

    return polars.DataFrame(group, schema=dict(schema()), orient="row")


def _rest(delivery: Delivery) -> tuple[Any, ...]:
    """Return the last columns, which are the same in each row."""
    batch = delivery.batch
    ended = batch.completed_at or batch.expired_at or batch.cancelled_at
    return batch.project_id, delivery.version, datetime.fromtimestamp(ended, UTC) if ended else None


def _values(row: ResultRow, endpoint: str, rest: tuple[Any, ...]) -> tuple[Any, ...]:
    return (
        *(row.custom_id, row.status, row.status_code, endpoint, row.model, row.answer, row.finish_reason),
        *(row.input_tokens, row.output_tokens, row.error_code, row.error_message, row.request_id),
        *(_text(row.response), _text(row.error), *rest),
    )


def _text(value: bytes | None) -> str | None:
    return value.decode("utf-8", "replace") if value is not None else None
