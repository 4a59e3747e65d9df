"""The settings of the built-in handlers. Part of `Settings`, which the front doors read and `vllm-batch config` prints.

A handler is made without arguments, so it reads them itself: from the environment and, below it, from `.env`.
"""

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class HandlerSettings(BaseSettings):
    """See the module docstring. Each handler is off while the setting that names its destination is empty."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True)

    delivery_folder: str = Field(
        default="",
        description="Folder into which the handler `directory` copies the results of each batch. Empty: it is off.",
    )
    handler_postgres_dsn: SecretStr = Field(
        default=SecretStr(""),
        description="Where the handler `postgres` writes results: `postgresql://user:password@host:5432/database`. "
        "Empty: it is off.",
    )
    handler_postgres_schema: str = Field(
        default="vllm_batch",
        min_length=1,
        description="Schema of the handler's tables there. It and the tables are made at the first delivery.",
    )
    handler_s3_url: str = Field(
        default="",
        description="Where the handler `s3` uploads results: `s3://bucket/prefix`. The credentials are those of AWS's "
        "own variables and files. Empty: it is off.",
    )
    handler_s3_endpoint_url: str = Field(
        default="",
        description="Address of an S3-compatible server, for the handlers `s3` and `parquet`. Empty: AWS, or what "
        "AWS_ENDPOINT_URL_S3 says.",
    )
    handler_s3_parquet: bool = Field(
        default=False, description="The handler `s3` also uploads the results as one Parquet file."
    )
    handler_parquet_url: str = Field(
        default="",
        description="Where the handler `parquet` keeps a data set of all results: a folder, or `s3://bucket/prefix`. "
        "Empty: it is off.",
    )
