"""The settings that pause batches: hours, disk, GPUs. Part of `Settings`, which the front doors read."""

from typing import Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings

from vllm_batch_dagster.core.dispatch_hours import parse_hours


class PauseSettings(BaseSettings):
    """See the module docstring."""

    dispatch_hours: str = Field(
        default="",
        description="Hours in which requests are sent to the engine, as `22:00-06:00` or `mon-fri 20:00-07:00, "
        "sat-sun 00:00-24:00`. Outside of them batches are paused. Empty: always.",
    )
    dispatch_time_zone: str = Field(
        default="", description="Time zone of DISPATCH_HOURS, as `Europe/Berlin`. Empty: the machine's."
    )
    disk_reserve_bytes: int = Field(
        default=64 << 20,
        ge=0,
        description="With fewer bytes free on the disk of the state folder, batches are paused. 0: never.",
    )
    gpu_gate: bool = Field(
        default=True,
        description="Pause batches while a GPU of the engine is too hot, slowed down, taken by others, broken or "
        "cannot be read. Only for an engine of our own on a GPU.",
    )
    gpu_pause_celsius: int = Field(default=88, ge=1, description="At this temperature of a GPU batches are paused.")
    gpu_resume_celsius: int = Field(default=78, ge=1, description="Below this temperature they go on.")
    gpu_pause_other_memory: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="When other programs have this share of a GPU's memory, batches are paused.",
    )
    gpu_resume_other_memory: float = Field(default=0.16, gt=0, le=1, description="Below this share they go on.")
    gpu_max_ecc_errors: int = Field(
        default=0,
        ge=0,
        description="With more uncorrectable ECC errors of a GPU since its driver was loaded, batches are paused.",
    )

    @field_validator("dispatch_hours")
    @classmethod
    def _readable_hours(cls, value: str) -> str:
        parse_hours(value)
        return value

    @field_validator("dispatch_time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            if value:
                ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"{value!r} is no time zone that this machine knows; write it as Europe/Berlin") from None
        return value

    @model_validator(mode="after")
    def _ordered_thresholds(self) -> Self:
        for quantity in ("celsius", "other_memory"):
            upper, lower = (getattr(self, f"gpu_{what}_{quantity}") for what in ("pause", "resume"))
            if lower >= upper:
                name = quantity.upper()
                raise ValueError(f"GPU_RESUME_{name} ({lower}) must be below GPU_PAUSE_{name} ({upper})")
        return self
