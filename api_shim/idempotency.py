"""The header Idempotency-Key of POST /v1/files, /v1/batches, /v1/uploads and its complete (rules: core/claims.py)."""

from typing import Annotated, Any

from fastapi import Depends, Request, Response

from api_shim.deps import ProjectDep
from vllm_batch_dagster.core.claims import MAX_CLAIM_KEY, ClaimKey, read_claim_key

HEADER = "Idempotency-Key"
REPLAYED = "idempotent-replayed"

# The `openapi_extra` of a route: the header is read without FastAPI, because a wrong one has a sentence of its own.
IDEMPOTENCY_PARAMETER: dict[str, Any] = {
    "parameters": [
        {
            "name": HEADER,
            "in": "header",
            "required": False,
            "schema": {"type": "string", "minLength": 1, "maxLength": MAX_CLAIM_KEY},
            "description": "Not OpenAI's: the same key and body within 24 hours return the same object.",
        }
    ]
}


class Idempotency:
    """What a request says about being a repetition, and where the answer says so."""

    def __init__(self, key: str | None, project_id: str, response: Response) -> None:
        self._key, self._project_id, self._response = key, project_id, response

    def claim_key(self, operation: str) -> ClaimKey | None:
        """None when the caller sent no key."""
        return ClaimKey(self._project_id, operation, self._key) if self._key is not None else None

    def mark_replayed(self) -> None:
        self._response.headers[REPLAYED] = "true"


async def get_idempotency(request: Request, response: Response, project_id: ProjectDep) -> Idempotency:
    """Raises InvalidInput for a header that cannot be a key."""
    value = request.headers.get(HEADER)
    return Idempotency(None if value is None else read_claim_key(value), project_id, response)


IdempotencyDep = Annotated[Idempotency, Depends(get_idempotency)]
