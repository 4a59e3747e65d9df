"""The `openai` client for the API of this machine, and what its errors mean to somebody at a terminal."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import openai
from openai.types import Batch

from vllm_batch_dagster.core.errors import BatchError, InvalidInput, StorageFailure
from vllm_batch_dagster.settings import Settings

# The client insists on one; without keys of its own the API does not look at it.
NO_KEY = "none"

TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})


@contextmanager
def open_client(settings: Settings) -> Iterator[openai.OpenAI]:
    """Yield a client. Raises InvalidInput or StorageFailure for what the API answers with an error."""
    url = settings.api_url
    # Proxies of the environment are not meant for our own machine.
    transport = openai.DefaultHttpx2Client(trust_env=False)
    key = settings.vllm_batch_api_key.get_secret_value() or os.environ.get("OPENAI_API_KEY") or NO_KEY
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=transport) as client:
        try:
            yield client
        except openai.OpenAIError as error:
            raise explain(error, url) from error


def explain(error: openai.OpenAIError, url: str) -> BatchError:
    """Return one of our errors with a sentence that says what to do."""
    if isinstance(error, openai.AuthenticationError):
        return InvalidInput("the API asks for a key: set VLLM_BATCH_API_KEY to one of `vllm-batch keys create`")
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        return InvalidInput(f"the API refuses ({error.status_code}): {body.get('message') or error.message}")
    if isinstance(error, openai.APIConnectionError):
        return StorageFailure(f"nothing answers at {url}: start it with `vllm-batch up`")
    return StorageFailure(f"the API at {url} gave no usable answer: {error}")


def is_terminal(batch: Batch) -> bool:
    return batch.status in TERMINAL
