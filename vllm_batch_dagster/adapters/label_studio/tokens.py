"""The two kinds of keys that Label Studio gives: a legacy token, and a personal access token: a JWT by which one gets
access tokens that live for five minutes."""

import base64
import binascii
from collections.abc import Callable
from typing import Any

import msgspec

RENEW_SECONDS = 60.0
_DEFAULT_LIFETIME = 300.0

Monotonic = Callable[[], float]


def is_personal(key: str) -> bool:
    """True for a personal access token."""
    return _claims(key).get("token_type") == "refresh"


def _claims(token: str) -> dict[str, Any]:
    """Return what a JWT says of itself, unverified; empty for anything else."""
    parts = token.split(".")
    if len(parts) != 3:
        return {}
    try:
        raw = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        return msgspec.json.decode(raw, type=dict[str, Any])
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return {}


class AccessToken:
    """An access token and when to ask for another: before it ends, by our own clock and its own lifetime, so that the
    server's clock does not matter."""

    def __init__(self, monotonic: Monotonic) -> None:
        self._monotonic = monotonic
        self.value, self._until = "", 0.0

    def take(self, token: str) -> None:
        claims = _claims(token)
        try:
            lifetime = float(claims["exp"]) - float(claims["iat"])
        except (KeyError, TypeError, ValueError):
            lifetime = _DEFAULT_LIFETIME
        self.value = token
        self._until = self._monotonic() + max(lifetime - RENEW_SECONDS, lifetime / 2)

    def drop(self) -> None:
        self.value = ""

    @property
    def is_good(self) -> bool:
        return bool(self.value) and self._monotonic() < self._until
