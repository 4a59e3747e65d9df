"""The `vllm-batch` command. Each subcommand is a function in a module of its own; errors become one sentence here."""

import sys

import typer
from pydantic import ValidationError

from vllm_batch_dagster.cli.batches import cancel, download, submit, watch
from vllm_batch_dagster.cli.config import config
from vllm_batch_dagster.cli.console import fail
from vllm_batch_dagster.cli.deliveries import app as deliveries
from vllm_batch_dagster.cli.doctor import doctor
from vllm_batch_dagster.cli.down import down
from vllm_batch_dagster.cli.gc import gc
from vllm_batch_dagster.cli.init import init
from vllm_batch_dagster.cli.keys import app as keys
from vllm_batch_dagster.cli.pausing import pause, resume
from vllm_batch_dagster.cli.retry import retry
from vllm_batch_dagster.cli.reviews import app as reviews
from vllm_batch_dagster.cli.status import status
from vllm_batch_dagster.cli.up import up
from vllm_batch_dagster.cli.validate import validate
from vllm_batch_dagster.cli.verify import verify
from vllm_batch_dagster.cli.webhooks import app as webhooks
from vllm_batch_dagster.core.errors import BatchError

app = typer.Typer(
    help="OpenAI's Batch API on your own machine: a FastAPI shim, a Dagster graph and vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
OPERATION = (up, down, status, doctor, config, init, pause, resume, gc)
BATCHES = (validate, verify, submit, watch, download, cancel, retry)
for command in (*OPERATION, *BATCHES):
    app.command()(command)
app.add_typer(keys, name="keys")
app.add_typer(deliveries, name="deliveries")
app.add_typer(webhooks, name="webhooks")
app.add_typer(reviews, name="reviews")


def run() -> None:
    """Run the command line. Exit code 1 when the command failed, 2 when it or a setting is written wrong."""
    try:
        app()
    except BatchError as error:
        sys.exit(fail(str(error)))
    except ValidationError as error:
        sys.exit(fail(describe_settings_error(error)) + 1)


def describe_settings_error(error: ValidationError) -> str:
    """Return one sentence that names every wrong setting."""
    faults = "; ".join(
        f"{'.'.join(str(part) for part in fault['loc']).upper()}: {fault['msg']}" for fault in error.errors()
    )
    return f"wrong settings, mend them in the environment or in .env: {faults}"
