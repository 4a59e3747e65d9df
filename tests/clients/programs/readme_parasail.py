"""The README's second example: Parasail's library. Only the URL is not its own; the key is in OPENAI_API_KEY.

Argument: base URL. It polls once a minute, as that library does.
"""

# ruff: noqa: T201

import json
import sys

from openai_batch import Batch
from openai_batch.providers import get_provider_by_name

# Point to your self-hosted server
provider = get_provider_by_name("openai")
provider.base_url = sys.argv[1]

# Use Parasail's library with your server!
with Batch(provider=provider) as batch:
    batch.add_to_batch(
        model="meta-llama/Meta-Llama-3-8B-Instruct", messages=[{"role": "user", "content": "Tell me a joke"}]
    )
    result, output_path, error_path = batch.submit_wait_download()

print(json.dumps({"batch": result.id, "status": result.status, "output": output_path, "errors": error_path}))
