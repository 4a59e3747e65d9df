"""The README's first example: `requests` and nothing else. Only URL, key, model and the wait are not its own.

Arguments: base URL, key, model, address of the webhook. Writes batch_output.jsonl.
"""

# ruff: noqa: PTH123, T201

import json
import sys
import time

import requests

base_url, api_key, model, webhook_url = sys.argv[1:]
requests = requests.Session()
requests.headers["Authorization"] = f"Bearer {api_key}"

with open("batch_input.jsonl", "w") as f:
    for number in range(3):
        body = {"model": model, "messages": [{"role": "user", "content": f"Tell me joke {number}"}]}
        line = {"custom_id": f"joke-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        f.write(json.dumps(line) + "\n")

# 1. Upload input file (JSONL format)
with open("batch_input.jsonl", "rb") as f:
    response = requests.post(f"{base_url}/files", files={"file": f}, data={"purpose": "batch"})
    file_id = response.json()["id"]

# 2. Create batch job
response = requests.post(
    f"{base_url}/batches",
    json={
        "input_file_id": file_id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"webhook_url": webhook_url},
    },
)
batch_id = response.json()["id"]

# 3. Check status
status = "validating"
while status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(1)
    response = requests.get(f"{base_url}/batches/{batch_id}")
    status = response.json()["status"]

# 4. Download results
response = requests.get(f"{base_url}/batches/{batch_id}/results")
with open("batch_output.jsonl", "wb") as f:
    f.write(response.content)

print(json.dumps({"batch": batch_id, "status": status}))
