"""`vllm-batch init`: what `up` does before it starts a service, for those who start the services themselves."""

import typer

from vllm_batch_dagster.cli.preparation import prepare_state
from vllm_batch_dagster.cli.state_folder import make_state_folder
from vllm_batch_dagster.settings import load_settings


def init() -> None:
    """Create the state folder and every database schema. Changes nothing that is already there."""
    settings = load_settings()
    make_state_folder(settings.vllm_batch_home)
    prepare_state(settings)
    typer.echo(f"{settings.vllm_batch_home} is ready.")
