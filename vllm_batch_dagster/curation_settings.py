"""The settings of the curation: the file of rules, and Label Studio. Part of `Settings`, which the front doors read."""

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from vllm_batch_dagster.core.judging import ReviewRule


class CurationSettings(BaseSettings):
    """See the module docstring."""

    # What was wrong may be a secret in the wrong place.
    model_config = SettingsConfigDict(hide_input_in_errors=True)

    curation_file: Path | None = Field(
        default=None,
        description="YAML file with the rules by which finished batches are curated. Empty: the defaults.",
    )
    label_studio_url: str = Field(
        default="",
        description="Address of a Label Studio, which then gets the answers that the rules select for review. Empty: "
        "nothing is pushed.",
    )
    label_studio_api_key: SecretStr = Field(
        default=SecretStr(""),
        description="Key for LABEL_STUDIO_URL: a legacy token or a personal access token. Empty: nothing is pushed.",
    )
    label_studio_project_id: int = Field(
        default=0,
        ge=0,
        description="Number of the Label Studio project for all tasks. 0: one project for each API project, which is "
        "made when it is missing.",
    )

    review_rule: ReviewRule = Field(
        default=ReviewRule.LATEST,
        description="How several reviewers of one answer are settled. latest: the newest annotation counts. majority: "
        "the verdict that most of them gave; a tie settles nothing.",
    )
    gold_min_rating: int = Field(
        default=4, ge=0, le=5, description="Least rating of an answer in the gold set. 0: any, also none."
    )
    regression_threshold: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Least agreement (mean token F1) with the gold set at which a regression report passes.",
    )

    @field_validator("label_studio_url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        parts = urlsplit(value.strip())
        if value.strip() and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("is no http or https address")
        if parts.username or parts.password:
            # It is shown in the UI.
            raise ValueError("must hold no user and no password: the key belongs into LABEL_STUDIO_API_KEY")
        return value.strip().rstrip("/")

    @field_validator("curation_file")
    @classmethod
    def _is_absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value is not None else None

    @property
    def pushes_to_label_studio(self) -> bool:
        """Whether address and key are both there."""
        return bool(self.label_studio_url and self.label_studio_api_key.get_secret_value().strip())
