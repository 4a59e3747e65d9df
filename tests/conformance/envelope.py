"""OpenAI's error envelope [59], as every number that expects a refusal reads it."""

from collections.abc import Mapping
from typing import Any

import httpx2


def read_error(answer: httpx2.Response, *statuses: int) -> Mapping[str, Any]:
    """Return the error of a refusal with one of `statuses`; fails when it is not exactly the envelope."""
    assert answer.status_code in statuses, f"{answer.request.url}: {answer.status_code} {answer.text}"
    body = answer.json()
    assert body.keys() == {"error"}, body
    error: Mapping[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code")), error
    return error
