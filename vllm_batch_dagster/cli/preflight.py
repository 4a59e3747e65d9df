"""What must be true before `up` starts anything. Every failure is one sentence with its mend."""

from collections import Counter

from vllm_batch_dagster.cli.addresses import describe_conflict, is_free, listening_addresses
from vllm_batch_dagster.cli.installation import engine_version
from vllm_batch_dagster.composition import build_catalog
from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.settings import Settings


def check_before_start(settings: Settings) -> None:
    """Raises ConfigurationError for the first thing that is wrong. The state folder is checked when it is made."""
    check_ports(settings)
    build_catalog(settings)
    check_engine(settings)


def check_ports(settings: Settings) -> None:
    """Every port is ours alone and free. Raises ConfigurationError."""
    addresses = listening_addresses(settings)
    for port, count in Counter(address.port for address in addresses).items():
        if count > 1:
            names = " and ".join(address.setting for address in addresses if address.port == port)
            raise ConfigurationError(f"{names} are both {port}: give each service a port of its own")
    for address in addresses:
        if not is_free(address.host, address.port):
            raise ConfigurationError(": ".join(describe_conflict(address)))


def check_engine(settings: Settings) -> None:
    """The environment of our own engine holds vLLM. Raises ConfigurationError."""
    if settings.engine_url or engine_version(settings.engine_python):
        return
    raise ConfigurationError(": ".join(describe_missing_engine(settings.engine_python)))


def describe_missing_engine(python: str) -> tuple[str, str]:
    """Return the fault of an engine environment without vLLM, and the mend."""
    return (
        f"{python} has no vLLM",
        "run `make setup`, set ENGINE_PYTHON to the Python of an environment that has it, "
        "or set ENGINE_URL to a running server",
    )
