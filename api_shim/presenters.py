"""Core values in, wire objects out. Pure; called by every route."""

from collections.abc import Sequence
from dataclasses import asdict

from api_shim.schemas import (
    BatchErrorList,
    BatchErrorObject,
    BatchList,
    BatchObject,
    FileList,
    FileObject,
    InputTokensDetails,
    ModelList,
    ModelObject,
    OutputTokensDetails,
    PauseObject,
    RepairsObject,
    RequestCountsObject,
    UploadObject,
    UploadPartObject,
    UsageObject,
)
from vllm_batch_dagster.core.models import Batch, File, LineError, Model, Page, RequestCounts, Usage
from vllm_batch_dagster.core.pauses import Pause, find_pause
from vllm_batch_dagster.core.uploads import Upload, UploadPart

MODEL_OWNER = "vllm"


def present_file(file: File) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
    )


def present_files(page: Page[File]) -> FileList:
    return FileList(
        data=[present_file(file) for file in page.data],
        first_id=page.data[0].id if page.data else None,
        last_id=page.data[-1].id if page.data else None,
        has_more=page.has_more,
    )


def present_upload(upload: Upload, file: File | None = None) -> UploadObject:
    """`file` is that of a completed upload."""
    return UploadObject(
        id=upload.id,
        bytes=upload.bytes,
        created_at=upload.created_at,
        expires_at=upload.expires_at,
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status.value,
        file=present_file(file) if file else None,
    )


def present_part(part: UploadPart) -> UploadPartObject:
    return UploadPartObject(id=part.id, created_at=part.created_at, upload_id=part.upload_id)


def present_batch(batch: Batch, pauses: Sequence[Pause] = (), now: float = 0.0) -> BatchObject:
    """`pauses` are those that hold at `now`."""
    pause = None if batch.is_terminal else find_pause(pauses, batch.id, batch.model, now)
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=present_errors(batch.errors) if batch.errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status.value,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at,
        expires_at=batch.expires_at,
        finalizing_at=batch.finalizing_at,
        completed_at=batch.completed_at,
        failed_at=batch.failed_at,
        expired_at=batch.expired_at,
        cancelling_at=batch.cancelling_at,
        cancelled_at=batch.cancelled_at,
        request_counts=present_counts(batch.counts),
        usage=_present_usage(batch.usage) if batch.usage else None,
        metadata=dict(batch.metadata) if batch.metadata is not None else None,
        paused=_present_pause(pause) if pause else None,
        repairs=RepairsObject(**asdict(batch.repairs)) if batch.repairs else None,
    )


def _present_pause(pause: Pause) -> PauseObject:
    # The first line: what follows may be the end of the engine's log, which is the operator's.
    reason = pause.reason.partition("\n")[0]
    return PauseObject(cause=pause.cause.value, reason=reason, since=pause.since, until=pause.until)


def present_batches(page: Page[Batch], pauses: Sequence[Pause] = (), now: float = 0.0) -> BatchList:
    return BatchList(
        data=[present_batch(batch, pauses, now) for batch in page.data],
        first_id=page.data[0].id if page.data else None,
        last_id=page.data[-1].id if page.data else None,
        has_more=page.has_more,
    )


def present_counts(counts: RequestCounts) -> RequestCountsObject:
    return RequestCountsObject(total=counts.total, completed=counts.completed, failed=counts.failed)


def present_models(models: Sequence[Model], created: int) -> ModelList:
    """One entry per name that a request may use, aliases included. `created`: unix seconds."""
    names = dict.fromkeys(name for model in models for name in model.names)
    return ModelList(data=[ModelObject(id=name, created=created, owned_by=MODEL_OWNER) for name in names])


def present_errors(errors: Sequence[LineError]) -> BatchErrorList:
    return BatchErrorList(
        data=[
            BatchErrorObject(code=error.code, message=error.message, param=error.param, line=error.line)
            for error in errors
        ]
    )


def _present_usage(usage: Usage) -> UsageObject:
    return UsageObject(
        input_tokens=usage.input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
        output_tokens=usage.output_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.total_tokens,
    )
