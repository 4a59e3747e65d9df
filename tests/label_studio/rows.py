"""Selected rows, as the curation writes them."""

from typing import Any

import msgspec

from vllm_batch_dagster.core.review import ReviewTask, make_task


def row(number: int, *, batch: str = "batch_1", answers: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"question {number}"}]
    return {
        "batch_id": batch,
        "custom_id": f"id-{number}",
        "model": "tiny",
        "prompt": f"question {number}",
        "messages": msgspec.json.encode(messages).decode(),
        "answers": list(answers or (f"answer {number}",)),
        "rules": ["random"],
        "score": None,
        "is_cut": False,
        "breaks_schema": False,
        "mean_logprob": None,
    } | changes


def tasks(count: int, **changes: Any) -> list[ReviewTask]:
    return [make_task(row(number, **changes)) for number in range(count)]
