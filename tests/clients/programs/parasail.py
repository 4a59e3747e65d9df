"""Parasail's `openai-batch`: one batch of one kind from the first line to both files.

Arguments: base URL, key, model, kind of batch. Prints what it came to as a last line of JSON.
"""

# ruff: noqa: T201

import json
import sys

from openai_batch import Batch
from openai_batch.providers import Provider

base_url, api_key, model, kind = sys.argv[1:]

REQUESTS = {
    "chat": [
        {"messages": [{"role": "user", "content": "Tell me a joke"}]},
        {"messages": [{"role": "user", "content": "Tell me another"}], "temperature": -1},
    ],
    "embeddings": [{"input": "one"}, {"input": ["two", "three"]}],
    "score": [{"text_1": "one", "text_2": "two"}, {"text_1": "one", "text_2": ["two", "three"]}],
    "rerank": [{"query": "one", "documents": ["two", "one"]}, {"query": "one", "documents": ["two"], "top_n": 1}],
}

with Batch(provider=Provider(base_url=base_url, api_key=api_key)) as batch:
    for request in REQUESTS[kind]:
        batch.add_to_batch(model=model, **request)
    result, output, errors = batch.submit_wait_download(interval=0.5)

print(json.dumps({"batch": result.id, "status": result.status, "output": output, "errors": errors}))
