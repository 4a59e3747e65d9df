"""One table: exception in, status and OpenAI's error envelope out (contract E.1). Registered by create_app.

A client sees no other body than the envelope on any status but 2xx, also for unknown routes and crashes.
"""

import errno
import json
from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from api_shim.schemas import ErrorEnvelope
from vllm_batch_dagster.core.creation import above_maximum, below_minimum, unsupported_value, wrong_type
from vllm_batch_dagster.core.errors import (
    BatchError,
    ClaimConflict,
    EngineFailure,
    InvalidInput,
    NotFound,
    StateConflict,
    StorageFailure,
)
from vllm_batch_dagster.core.limits import STORAGE_LIMIT_EXCEEDED
from vllm_batch_dagster.core.uploads import PART_TOO_LARGE
from vllm_batch_dagster.stages.intake import FILE_TOO_LARGE

UNSUPPORTED_TYPE = "unsupported_content_type"
BODY_TOO_LARGE = "request_too_large"
DISK_IS_FULL = "insufficient_storage"

# First match wins; the tree is drawn in core/errors.py.
STATUS_OF: tuple[tuple[type[Exception], int], ...] = (
    (InvalidInput, 400),
    (NotFound, 404),
    (StateConflict, 409),
    (StorageFailure, 500),
    (EngineFailure, 503),
    (BatchError, 500),
    (RequestValidationError, 400),
    (ClientDisconnect, 400),
)
# Kinds of wrong input that HTTP has a status of their own for.
STATUS_OF_CODE = {
    FILE_TOO_LARGE: 413,
    PART_TOO_LARGE: 413,
    BODY_TOO_LARGE: 413,
    UNSUPPORTED_TYPE: 415,
    STORAGE_LIMIT_EXCEEDED: 403,  # the client tries 429 again, and waiting makes no room
}

# The openai client sends 409 and 5xx again by itself (contract E.2); a second try changes nothing for these.
NOT_RETRIED = frozenset({409, 507})
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

# Sentence for (query parameter, pydantic's context, what was sent), by pydantic's error type.
_QUERY_ERRORS: dict[str, Callable[[str, Mapping[str, object], object], InvalidInput]] = {
    "int_parsing": lambda param, context, sent: wrong_type(param, "an integer", sent),
    "greater_than_equal": lambda param, context, sent: below_minimum(param, sent, context["ge"]),
    "less_than_equal": lambda param, context, sent: above_maximum(param, sent, context["le"]),
    "literal_error": lambda param, context, sent: unsupported_value(
        param, str(sent), str(context["expected"]).replace("'", "").split(" or ")
    ),
}


def install_error_handlers(app: FastAPI) -> None:
    for kind, _ in STATUS_OF:
        app.add_exception_handler(kind, _answer_known)
    app.add_exception_handler(HTTPException, _answer_http)


def envelope(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    kind: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the error response. ASCII JSON, because a message may quote text that has no UTF-8."""
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    extra = {"x-should-retry": "false"} if status in NOT_RETRIED else {}
    return Response(
        json.dumps(body),
        status_code=status,
        media_type="application/json",
        headers={**extra, **(headers or {})},
    )


def error_responses(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The `responses` of a route for the OpenAPI document."""
    return {status: {"model": ErrorEnvelope} for status in statuses}


async def _answer_known(request: Request, failure: Exception) -> Response:
    if isinstance(failure, RequestValidationError):
        failure = _read_validation_error(failure)
    status = next(status for kind, status in STATUS_OF if isinstance(failure, kind))
    match failure:
        case InvalidInput():
            status = STATUS_OF_CODE.get(failure.code or "", status)
            return envelope(status, failure.message, param=failure.param, code=failure.code)
        case NotFound():
            return _not_found(failure)
        case ClaimConflict():
            return envelope(status, str(failure), param="Idempotency-Key", code="idempotency_key_reused")
        case StorageFailure() if _is_disk_full(failure):
            return envelope(507, "The server's disk is full. Nothing was stored.", code=DISK_IS_FULL)
        case ClientDisconnect():
            return envelope(status, "The connection was closed before the request was complete.")
    return envelope(status, str(failure))


async def _answer_http(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, HTTPException)
    where = f"{request.method} {request.url.path}"
    if failure.status_code == 404:
        return envelope(404, f"Invalid URL ({where})")
    if failure.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path}."
        return envelope(405, message, code="method_not_supported", headers=failure.headers)
    return envelope(failure.status_code, str(failure.detail), headers=failure.headers)


def _not_found(failure: NotFound) -> Response:
    if failure.kind == "file":
        return envelope(404, f"No such File object: {failure.object_id}", param="id")
    return envelope(404, f"No {failure.kind} found with id '{failure.object_id}'.")


def _read_validation_error(failure: RequestValidationError) -> InvalidInput:
    first = failure.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    make = _QUERY_ERRORS.get(first["type"])
    if make is None:
        return InvalidInput(f"Invalid '{param}': {first['msg']}.", param=param, code="invalid_value")
    return make(param, first.get("ctx", {}), first["input"])


def _is_disk_full(failure: StorageFailure) -> bool:
    cause = failure.__cause__
    return isinstance(cause, OSError) and cause.errno in DISK_FULL
