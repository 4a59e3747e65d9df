"""How many requests a client really sends: the openai package retries some of what it is refused."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import openai


@contextmanager
def sent_by(client: openai.OpenAI) -> Iterator[list[httpx2.Request]]:
    """Collect the requests of `client` meanwhile."""
    sent: list[httpx2.Request] = []
    hooks = client._client.event_hooks
    client._client.event_hooks = {**hooks, "request": [*hooks.get("request", []), sent.append]}
    try:
        yield sent
    finally:
        client._client.event_hooks = hooks
