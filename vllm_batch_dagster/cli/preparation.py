"""Makes the state folder ready for the services: folders, Dagster's home, every database schema. Idempotent."""

import subprocess
import sys

from vllm_batch_dagster.cli.installation import write_dagster_home
from vllm_batch_dagster.cli.services import stack_environment
from vllm_batch_dagster.composition import build_store, sweep_files
from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.settings import Settings

STORAGE_SECONDS = 180
SHOWN_LINES = 5


def prepare_state(settings: Settings) -> None:
    """Create or upgrade what the services need before the first of them starts. Raises ConfigurationError."""
    write_dagster_home(settings)
    build_store(settings)
    sweep_files(settings)
    _prepare_dagster(settings)


def _prepare_dagster(settings: Settings) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vllm_batch_dagster.cli.dagster_storage"],
            env=stack_environment(settings),
            capture_output=True,
            text=True,
            timeout=STORAGE_SECONDS,
            check=False,
            # Ctrl-C is for us: a schema that is cut in the middle would have to be mended.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(
            f"Dagster's databases in {settings.dagster_home} were not ready after {STORAGE_SECONDS} s: "
            "look for another process that holds them, then start again"
        ) from error
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-SHOWN_LINES:])
        raise ConfigurationError(
            f"Dagster's databases in {settings.dagster_home} could not be opened: mend what Dagster says below, "
            f"or move the folder away to start with a new one\n{last}"
        )
