"""The report of POST /v1/batches/validate on the wire. Not OpenAI's; bad lines have the shape of a batch's `errors`."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from api_shim.presenters import present_errors
from api_shim.schemas import BatchErrorList
from vllm_batch_dagster.core.models import Batch, LineError
from vllm_batch_dagster.core.preflight import Measurement, ModelLoad, describe_run_time, describe_sample
from vllm_batch_dagster.stages.preflight import Preflight

DUPLICATE_ID = "duplicate_custom_id"


class DuplicatesObject(BaseModel):
    custom_ids: int = Field(description="Lines listed in `errors` for a custom_id that an earlier line has.")
    requests: int = Field(description="Lines whose body stood earlier in the file: they would be answered again.")
    exact: bool = Field(description="False above 65,536 different bodies: then within about half a percent.")


class BucketObject(BaseModel):
    up_to: int = Field(description="Tokens; the bucket holds what is above the bucket before it.")
    lines: int


class TokensObject(BaseModel):
    input_tokens: int = Field(description="Of the whole file.")
    longest: int = Field(description="Tokens of the longest prompt that was looked at.")
    counted_lines: int
    sampled: bool
    histogram: list[BucketObject] = Field(description="Of the counted lines.")
    note: str


class ModelLoadObject(BaseModel):
    model: str
    lines: int
    input_tokens: int
    tokenizer: Literal["model", "estimate"]
    max_model_len: int | None
    note: str


class MisfitObject(BaseModel):
    line: int
    custom_id: str
    code: str
    tokens: int
    max_model_len: int


class MisfitList(BaseModel):
    object: Literal["list"] = "list"
    data: list[MisfitObject]
    total: int
    shortened: int = Field(description="Lines that leave less room for the answer than their max_tokens.")


class RunTimeObject(BaseModel):
    seconds: float | None
    low: float | None
    high: float | None
    chunks: int
    note: str


class BatchValidation(BaseModel):
    object: Literal["batch.validation"] = "batch.validation"
    valid: bool = Field(description="True when the batch would run.")
    input_file_id: str
    endpoint: str
    model: str | None
    lines: int
    bytes: int
    rejected_lines: int = Field(description="Lenient mode: bad lines beside which the others would run.")
    errors: BatchErrorList | None
    errors_truncated: bool
    duplicates: DuplicatesObject | None
    tokens: TokensObject | None
    models: list[ModelLoadObject]
    too_long: MisfitList | None
    run_time: RunTimeObject | None


def present_preflight(batch: Batch, preflight: Preflight, max_errors: int) -> BatchValidation:
    report, measured = preflight.report, preflight.measurement
    errors = report.errors or report.rejections
    return BatchValidation(
        valid=not report.errors,
        input_file_id=batch.input_file_id,
        endpoint=batch.endpoint,
        model=report.model,
        lines=report.lines,
        bytes=report.bytes,
        rejected_lines=report.rejected,
        errors=present_errors(errors) if errors else None,
        errors_truncated=len(errors) >= max_errors,
        duplicates=_present_duplicates(measured, errors) if measured else None,
        tokens=_present_tokens(measured) if measured else None,
        models=[_present_load(load) for load in measured.loads] if measured else [],
        too_long=_present_misfits(measured) if measured else None,
        run_time=_present_run_time(measured) if measured else None,
    )


def _present_duplicates(measured: Measurement, errors: Sequence[LineError]) -> DuplicatesObject:
    return DuplicatesObject(
        custom_ids=sum(error.code == DUPLICATE_ID for error in errors),
        requests=measured.repeats or 0,
        exact=measured.repeats_exact,
    )


def _present_tokens(measured: Measurement) -> TokensObject:
    media = " Pictures and sound are not counted." if measured.has_media else ""
    return TokensObject(
        input_tokens=measured.input_tokens,
        longest=measured.longest,
        counted_lines=measured.counted,
        sampled=measured.is_sampled,
        histogram=[BucketObject(up_to=bound, lines=count) for bound, count in measured.lengths],
        note=describe_sample(measured) + media,
    )


def _present_load(load: ModelLoad) -> ModelLoadObject:
    context = "The model's context length is not known"
    if load.context is not None:
        context = f"A request may have {load.context.tokens} tokens, {load.context.source}"
    return ModelLoadObject(
        model=load.model,
        lines=load.lines,
        input_tokens=load.input_tokens,
        tokenizer="model" if load.is_exact else "estimate",
        max_model_len=load.context.tokens if load.context else None,
        note=f"{load.method} {context}.",
    )


def _present_misfits(measured: Measurement) -> MisfitList:
    data = [
        MisfitObject(
            line=misfit.line,
            custom_id=misfit.custom_id,
            code=misfit.code,
            tokens=misfit.tokens,
            max_model_len=misfit.max_model_len,
        )
        for misfit in measured.misfits
    ]
    return MisfitList(data=data, total=measured.misfit_count, shortened=measured.shortened)


def _present_run_time(measured: Measurement) -> RunTimeObject:
    time = measured.run_time
    return RunTimeObject(
        seconds=round(time.seconds, 1) if time else None,
        low=round(time.low, 1) if time else None,
        high=round(time.high, 1) if time else None,
        chunks=time.chunks if time else 0,
        note=describe_run_time(measured),
    )
