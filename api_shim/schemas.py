"""Objects on the wire, exactly OpenAI's: every key is there, null where nothing is (contract A.2, C.2, E.1).

Presenters make them, routes return them, and the OpenAPI document is generated from them.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from vllm_batch_dagster.core.creation import (
    MAX_EXPIRY_SECONDS,
    MAX_INPUT_FILE_ID,
    MAX_METADATA_KEY,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE,
    MIN_EXPIRY_SECONDS,
)
from vllm_batch_dagster.core.models import ENDPOINTS, UPLOAD_PURPOSES
from vllm_batch_dagster.core.uploads import MAX_NAME, MAX_UPLOAD_BYTES
from vllm_batch_dagster.core.windows import PATTERN


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class UploadObject(BaseModel):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None


class UploadPartObject(BaseModel):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class BatchErrorObject(BaseModel):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrorList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchErrorObject]


class RequestCountsObject(BaseModel):
    total: int
    completed: int
    failed: int


class InputTokensDetails(BaseModel):
    cached_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class UsageObject(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class PauseObject(BaseModel):
    """An extension: OpenAI's batches are never paused."""

    cause: Literal["operator", "schedule", "gpu", "engine", "storage"]
    reason: str
    since: int
    until: int | None


class RepairsObject(BaseModel):
    """An extension: what repair rounds did, of a batch that asks for them and has ended."""

    repaired: int
    unrepaired: int
    repeats: int
    repeat_tokens: int


class BatchObject(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrorList | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCountsObject
    usage: UsageObject | None
    metadata: dict[str, str] | None
    paused: PauseObject | None = Field(default=None, exclude_if=lambda pause: pause is None)
    repairs: RepairsObject | None = Field(default=None, exclude_if=lambda repairs: repairs is None)


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    error: ErrorObject


class HealthObject(BaseModel):
    """Not OpenAI's: what `GET /health` answers when all is well."""

    status: Literal["ok"] = "ok"
    version: str


class ServerStatus(BaseModel):
    """Not OpenAI's: what `GET /` answers. The last three are null for a caller without a key where keys exist."""

    name: str
    version: str
    docs: str = Field(description="Path of the interactive documentation of this API.")
    dagster_url: str | None = None
    open_batches: int | None = Field(
        default=None, description="Batches of the caller's project that are not in a terminal state."
    )
    request_counts: RequestCountsObject | None = Field(default=None, description="Summed over the open batches.")


# Request bodies, for the OpenAPI document only. core/creation.py checks them, because the sentences of a
# refusal are part of the contract.
EXPIRES_AFTER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["anchor", "seconds"],
    "properties": {
        "anchor": {"type": "string", "enum": ["created_at"]},
        "seconds": {"type": "integer", "minimum": MIN_EXPIRY_SECONDS, "maximum": MAX_EXPIRY_SECONDS},
    },
}
UPLOAD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(UPLOAD_PURPOSES)},
        **{f"expires_after[{name}]": rule for name, rule in EXPIRES_AFTER_SCHEMA["properties"].items()},
    },
}
CREATE_UPLOAD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["filename", "purpose", "bytes", "mime_type"],
    "properties": {
        "filename": {"type": "string", "maxLength": MAX_NAME},
        "purpose": {"type": "string", "enum": list(UPLOAD_PURPOSES)},
        "bytes": {"type": "integer", "minimum": 0, "maximum": MAX_UPLOAD_BYTES},
        "mime_type": {"type": "string", "maxLength": MAX_NAME},
        "expires_after": {"anyOf": [EXPIRES_AFTER_SCHEMA, {"type": "null"}]},
    },
}
UPLOAD_PART_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "format": "binary"}},
}
COMPLETE_UPLOAD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["part_ids"],
    "properties": {
        "part_ids": {"type": "array", "items": {"type": "string"}},
        "md5": {"type": ["string", "null"], "pattern": "^[0-9a-fA-F]{32}$"},
    },
}
CREATE_BATCH_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["input_file_id", "endpoint", "completion_window"],
    "properties": {
        "input_file_id": {"type": "string", "maxLength": MAX_INPUT_FILE_ID},
        "endpoint": {"type": "string", "enum": list(ENDPOINTS)},
        "completion_window": {"type": "string", "pattern": PATTERN},
        "metadata": {
            "type": ["object", "null"],
            "maxProperties": MAX_METADATA_PAIRS,
            "propertyNames": {"maxLength": MAX_METADATA_KEY},
            "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE},
        },
        "output_expires_after": {"anyOf": [EXPIRES_AFTER_SCHEMA, {"type": "null"}]},
    },
}
RETRY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: CREATE_BATCH_SCHEMA["properties"][name] for name in ("completion_window", "metadata")},
}


def request_body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}
