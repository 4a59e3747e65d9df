"""Idempotency keys: what makes two calls the same call. Used by the API; the batch store keeps the claims.

A claim is stored in the transaction that stores its object. So a call that failed leaves none, a crash leaves both
or neither, and of two calls at once the second finds the first one's claim and gets the first one's object.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_batch_dagster.core.creation import FileFacts, clean_filename
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.models import DAY_SECONDS

CLAIM_SECONDS = DAY_SECONDS
MAX_CLAIM_KEY = 255
FILES = "files"
BATCHES = "batches"
UPLOADS = "uploads"
COMPLETIONS = "uploads.complete"

_KEY = re.compile(rf"[\x20-\x7e]{{1,{MAX_CLAIM_KEY}}}")


@dataclass(frozen=True, slots=True)
class ClaimKey:
    """An Idempotency-Key and where it holds: in one project, for one operation."""

    project_id: str
    operation: str
    key: str


@dataclass(frozen=True, slots=True)
class Claim:
    """An idempotency key together with the `fingerprint` of the body that came with it."""

    key: ClaimKey
    fingerprint: str


def read_claim_key(value: str) -> str:
    """Return the value of an Idempotency-Key header. Raises InvalidInput."""
    if not _KEY.fullmatch(value):
        raise InvalidInput(
            f"Invalid 'Idempotency-Key' header: send 1 to {MAX_CLAIM_KEY} printable ASCII characters, for instance "
            "a UUID.",
            param="Idempotency-Key",
            code="invalid_value",
        )
    return value


def claim_file(key: ClaimKey, facts: FileFacts, sha256: str) -> Claim:
    """A file is the same file when its content, purpose, name and expiry are."""
    return Claim(key, _digest([sha256, facts.purpose, clean_filename(facts.filename), facts.expires_after]))


def claim_batch(key: ClaimKey, params: Mapping[str, object]) -> Claim:
    """A batch is the same batch when its JSON is, in any order of its keys."""
    return Claim(key, _digest(params))


def claim_upload(key: ClaimKey, params: Mapping[str, object]) -> Claim:
    """An upload is the same upload when its JSON is, in any order of its keys."""
    return Claim(key, _digest(params))


def claim_completion(key: ClaimKey, upload_id: str, part_ids: Sequence[str], md5: str | None) -> Claim:
    """A completion is the same one when it joins the same parts of the same upload, in the same order."""
    return Claim(key, _digest([upload_id, list(part_ids), md5]))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
