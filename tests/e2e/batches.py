"""Request files, and what a user does with them through the official `openai` client."""

import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import openai
from openai.types import Batch

TERMINAL = {"completed", "failed", "expired", "cancelled"}
BATCH_SECONDS = 600

Line = Mapping[str, Any]


def request(custom_id: str, url: str, **body: object) -> Line:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def chat(number: int, model: str, **body: object) -> Line:
    """Return a chat request with the id `line-<number>`, of 16 tokens at most."""
    messages = [{"role": "user", "content": f"Say something about the number {number}."}]
    return request(
        f"line-{number}", "/v1/chat/completions", model=model, messages=messages, **{"max_tokens": 16} | body
    )


def submit(
    client: openai.OpenAI,
    lines: Iterable[Line] | bytes,
    endpoint: str = "/v1/chat/completions",
    metadata: dict[str, str] | None = None,
) -> Batch:
    """Upload `lines` and create a batch of them."""
    content = lines if isinstance(lines, bytes) else b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file = client.files.create(file=("lines.jsonl", io.BytesIO(content)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window="24h",
        metadata=metadata,
    )


def wait(client: openai.OpenAI, batch_id: str, until: Callable[[Batch], bool]) -> Batch:
    """Poll the batch until it is as wanted or has ended."""
    end = time.monotonic() + BATCH_SECONDS
    while True:
        batch = client.batches.retrieve(batch_id)
        if until(batch) or batch.status in TERMINAL:
            return batch
        assert time.monotonic() < end, f"{batch_id} is still {batch.status}: {batch.request_counts}"
        time.sleep(0.2)


def finish(client: openai.OpenAI, batch_id: str) -> Batch:
    return wait(client, batch_id, lambda _: False)


def read(client: openai.OpenAI, file_id: str | None) -> Sequence[Mapping[str, Any]]:
    """Return the lines of an output or error file."""
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def ids(lines: Iterable[Line]) -> Sequence[str]:
    return [str(line["custom_id"]) for line in lines]
