"""The settings of what takes results elsewhere: webhooks and handlers. Part of `Settings`, read by the front doors."""

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings

from vllm_batch_dagster.core.webhook_urls import read_allowed_hosts


class DeliverySettings(BaseSettings):
    """See the module docstring."""

    webhook_allowed_hosts: str = Field(
        default="",
        description="Hosts, addresses and networks that webhooks may reach although they are not on the public "
        "internet, and over plain http: `receiver.internal, 10.0.0.0/8`. A listed name may have any address.",
    )
    handlers: str = Field(
        default="",
        description="Names of the result handlers that may run, comma-separated. Empty: every installed one that is "
        "enabled. The key `handlers` of a batch's metadata chooses among them.",
    )
    handler_modules: str = Field(
        default="",
        description="Python modules, or paths of .py files, that register result handlers when imported; "
        "comma-separated.",
    )
    handler_timeout_seconds: int = Field(
        default=1800,
        ge=1,
        description="How long a result handler may take for a batch. After that the attempt counts as failed, and is "
        "made again later.",
    )

    @field_validator("webhook_allowed_hosts")
    @classmethod
    def _readable(cls, value: str) -> str:
        read_allowed_hosts(value)
        return value
