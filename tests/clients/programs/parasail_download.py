"""Parasail's `openai-batch`: download whatever a batch has. Arguments: base URL, key, batch id."""

# ruff: noqa: T201

import json
import sys

from openai_batch import Batch
from openai_batch.providers import Provider

base_url, api_key, batch_id = sys.argv[1:]
with Batch(batch_id=batch_id, provider=Provider(base_url=base_url, api_key=api_key)) as batch:
    output, errors = batch.download()
print(json.dumps({"output": output, "errors": errors}))
