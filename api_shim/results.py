"""GET /v1/batches/{id}/results at any time: the output file once there is one, the finished lines before. Not OpenAI's.

Lines of an open batch are read from the journals (stages/partial.py). A follower waits between two looks without a
thread of its own, and ends when the batch ends or the client goes away.
"""

import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Annotated, Any, BinaryIO, Literal

import anyio
import msgspec
from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from api_shim.deps import BatchDep, Services, ServicesDep
from api_shim.downloads import DOWNLOAD_RESPONSES, send_contents
from api_shim.errors import envelope, error_responses
from vllm_batch_dagster.core.errors import NotFound
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.stages.intake import find_file
from vllm_batch_dagster.stages.partial import BLOCK_BYTES, PartialResults

NO_OUTPUT = "no_output_file"
RESULTS_GONE = "results_gone"
TOO_MANY_FOLLOWERS = "too_many_followers"
NEXT_CURSOR = "x-next-cursor"
JSON_LINES = "application/jsonl"

LOOK_SECONDS = 1.0  # between two looks of a follower
MARKER_SECONDS = 15.0  # a follower that asked for cursors hears from us at least so often
RETRY_SECONDS = 5

router = APIRouter(prefix="/v1/batches", tags=["batches"])

RESPONSES: dict[int | str, dict[str, Any]] = {**DOWNLOAD_RESPONSES, **error_responses(400, 429)}


@router.head("/{batch_id}/results", include_in_schema=False)
@router.get("/{batch_id}/results", response_class=StreamingResponse, responses=RESPONSES)
async def download_results(
    request: Request,
    batch: BatchDep,
    services: ServicesDep,
    after: Annotated[str, Query(description="Cursor of an earlier answer: only what came since.")] = "",
    follow: Annotated[bool, Query(description="Send lines as they are finished, until the batch has ended.")] = False,
    cursors: Annotated[bool, Query(description="Put cursor objects between the lines.")] = False,
    include: Annotated[Literal["errors"] | None, Query(description="Send failed requests too.")] = None,
) -> Response:
    with_errors, is_head = include is not None, request.method == "HEAD"
    if batch.status is BatchStatus.FAILED or (batch.is_terminal and not after):
        return await to_thread.run_sync(_send_files, request, batch, services, with_errors, limiter=services.disk)
    if batch.purged_at is not None:
        message = f"The journals of batch {batch.id} are gone. Without 'after' you get its output file."
        return envelope(404, message, param="after", code=RESULTS_GONE)
    if follow and not is_head and services.followers.are_full:
        message = f"{services.followers.most} readers follow batches already. Try later, or poll without 'follow'."
        return envelope(429, message, code=TOO_MANY_FOLLOWERS, headers={"retry-after": str(RETRY_SECONDS)})

    def open_reader() -> PartialResults:
        ports = (services.store, services.files, services.workspace)
        return PartialResults(batch, *ports, after=after, with_errors=with_errors)

    reader = await to_thread.run_sync(open_reader, limiter=services.disk)
    if follow and not is_head:
        return StreamingResponse(_follow(reader, services, cursors), media_type=JSON_LINES)
    cursor = await to_thread.run_sync(reader.freeze, limiter=services.disk)
    headers = {NEXT_CURSOR: str(cursor), "cache-control": "no-store"}
    if is_head:
        reader.close()
        return Response(headers=headers, media_type=JSON_LINES)
    return StreamingResponse(_drain(reader, services, cursors), media_type=JSON_LINES, headers=headers)


async def _follow(reader: PartialResults, services: Services, cursors: bool) -> AsyncIterator[bytes]:
    """Yield blocks of lines until the batch has ended or is gone."""
    told_at = time.monotonic()
    with services.followers.one():
        while True:
            try:
                is_last = await to_thread.run_sync(reader.refresh, limiter=services.disk)
            except NotFound:
                return
            async for block in _drain(reader, services, cursors):
                told_at = time.monotonic()
                yield block
            if is_last:
                return
            if cursors and time.monotonic() - told_at >= MARKER_SECONDS:
                told_at = time.monotonic()
                yield _marker(reader)
            await anyio.sleep(LOOK_SECONDS)


async def _drain(reader: PartialResults, services: Services, cursors: bool) -> AsyncIterator[bytes]:
    try:
        while block := await to_thread.run_sync(reader.next_block, limiter=services.disk):
            yield block + _marker(reader) if cursors else block
    finally:
        reader.close()


def _marker(reader: PartialResults) -> bytes:
    """A line that says where the reader stands; nothing where that has no name."""
    cursor = reader.cursor
    return msgspec.json.encode({"object": "cursor", "after": str(cursor)}) + b"\n" if cursor else b""


def _send_files(request: Request, batch: Batch, services: Services, with_errors: bool) -> Response:
    """The output file of a batch that has ended; with its error file behind it when that is asked for."""
    ids = (batch.output_file_id, batch.error_file_id if with_errors else None)
    now = services.clock()
    files = [find_file(file_id, services.store, now) for file_id in ids if file_id]
    if not files:
        return _explain_absence(batch)
    if len(files) == 1:
        return send_contents(request, files[0], services, media_type=JSON_LINES)
    headers = {"content-length": str(sum(file.bytes for file in files))}
    if request.method == "HEAD":
        return Response(headers=headers, media_type=JSON_LINES)
    with ExitStack() as stack:
        readers = [stack.enter_context(services.files.open(file.id)) for file in files]
        body = _concatenate(readers, stack.pop_all(), services)
    return StreamingResponse(body, media_type=JSON_LINES, headers=headers)


async def _concatenate(readers: list[BinaryIO], closing: ExitStack, services: Services) -> AsyncIterator[bytes]:
    with closing:
        for reader in readers:
            while block := await to_thread.run_sync(reader.read, BLOCK_BYTES, limiter=services.disk):
                yield block


def _explain_absence(batch: Batch) -> Response:
    """404 that says the status. Error lines are no substitute: whoever reads results expects answers."""
    reason = f"Batch {batch.id} is '{batch.status.value}' and no request of it succeeded."
    if batch.error_file_id is not None:
        reason += f" The reasons are in its error file: GET /v1/files/{batch.error_file_id}/content"
    elif batch.errors:
        reason += " Its input did not pass validation: see 'errors' in GET /v1/batches/" + batch.id
    return envelope(404, reason, code=NO_OUTPUT)
