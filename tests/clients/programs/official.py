"""The `openai` package, in the words that every release since 1.60 knows: upload, create, list, poll, download, cancel.

Arguments: base URL, key, model, endpoint. Prints what it came to as a last line of JSON.
"""

# ruff: noqa: PTH123, T201

import json
import sys
import time

import openai

base_url, api_key, model, endpoint = sys.argv[1:]
BODIES = {
    "/v1/chat/completions": [{"messages": [{"role": "user", "content": f"Joke {n}"}]} for n in range(3)],
    "/v1/embeddings": [{"input": f"text {n}"} for n in range(3)],
}
client = openai.OpenAI(base_url=base_url, api_key=api_key)

lines = [
    {"custom_id": f"line-{number}", "method": "POST", "url": endpoint, "body": {"model": model, **body}}
    for number, body in enumerate(BODIES[endpoint])
]
with open("input.jsonl", "w") as file:
    file.writelines(json.dumps(line) + "\n" for line in lines)
with open("input.jsonl", "rb") as file:
    uploaded = client.files.create(file=file, purpose="batch")
assert client.files.retrieve(uploaded.id).filename == "input.jsonl"

batch = client.batches.create(
    input_file_id=uploaded.id, endpoint=endpoint, completion_window="24h", metadata={"made-by": openai.__version__}
)
assert batch.id in [listed.id for listed in client.batches.list(limit=1)]
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(1)
    batch = client.batches.retrieve(batch.id)

answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
try:
    client.batches.cancel(batch.id)
except openai.ConflictError as refusal:
    cancelled = refusal.status_code
try:
    client.files.retrieve("file-unknown")
except openai.NotFoundError as refusal:
    missing = refusal.param

print(
    json.dumps(
        {
            "version": openai.__version__,
            "status": batch.status,
            "metadata": batch.metadata,
            "ids": sorted(answer["custom_id"] for answer in answers),
            "kinds": sorted({answer["response"]["body"]["object"] for answer in answers}),
            "cancelled": cancelled,
            "missing": missing,
        }
    )
)
