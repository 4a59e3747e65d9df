"""Bearer keys: how one is made, what is kept of it, how a caller's is held against it. Used by the API and the CLI.

A key is `vb-` and 256 random bits. Only its SHA-256 is stored: nobody can guess 256 bits, so the slow hash that a
password needs would cost every request time and protect nothing, and a salt has no equal keys to tell apart.
"""

import hashlib
import hmac
import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass

from vllm_batch_dagster.core.creation import ID_BYTES, Randomness
from vllm_batch_dagster.core.errors import InvalidInput

PREFIX = "vb-"
SECRET_BYTES = 32
MAX_LABEL = 100
SHOWN_CHARACTERS = 6
STARS = "*" * 8

_PROJECT = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?")
_BEARER = re.compile(r"bearer +([\x21-\x7e]+) *", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is stored. `hash` is hex. `last_used_at` is coarse (see api_shim/auth.py); times in unix seconds."""

    id: str
    project_id: str
    hash: str
    label: str
    created_at: int
    revoked_at: int | None = None
    last_used_at: int | None = None

    @property
    def is_live(self) -> bool:
        return self.revoked_at is None


def new_secret(randomness: Randomness) -> str:
    """Return what the holder of the key sends. It is shown once and kept nowhere."""
    return PREFIX + urlsafe_b64encode(randomness(SECRET_BYTES)).rstrip(b"=").decode()


def make_key(secret: str, project: str, label: str, randomness: Randomness, created_at: int) -> Key:
    """Return what is stored of a new key. Raises InvalidInput for a project or label that cannot be one."""
    return Key(
        id=f"key_{randomness(ID_BYTES).hex()}",
        project_id=read_project(project),
        hash=hash_secret(secret),
        label=read_label(label),
        created_at=created_at,
    )


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def is_same_hash(one: str, other: str) -> bool:
    """Compare in a time that does not tell how many characters agree."""
    return hmac.compare_digest(one, other)


def read_bearer(header: str) -> str | None:
    """Return the key in an Authorization header, None when the header is not `Bearer <key>`."""
    found = _BEARER.fullmatch(header)
    return found.group(1) if found else None


def mask_secret(secret: str) -> str:
    """Return what may be shown of a key that was refused: enough to recognise it, never enough to use it."""
    return secret[: min(SHOWN_CHARACTERS, len(secret) // 4)] + STARS


def read_project(name: str) -> str:
    """Return the name of a project. Raises InvalidInput."""
    if not _PROJECT.fullmatch(name):
        raise InvalidInput(
            f"'{name[:100]}' cannot be a project: write 1 to 64 lower-case letters, digits, '-' and '_', with a "
            "letter or digit at both ends",
            param="project",
            code="invalid_value",
        )
    return name


def read_label(label: str) -> str:
    """Return the label of a key. Raises InvalidInput."""
    if len(label) > MAX_LABEL or not label.isprintable():
        raise InvalidInput(f"a label has at most {MAX_LABEL} printable characters", param="label", code="invalid_value")
    return label
