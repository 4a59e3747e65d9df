"""Webhooks: who is told of a batch's end, in which bytes, with which secret, and when it is tried again. Pure.

The last step of the data path. `stages/webhooks.py` finds the targets of an event and delivers to one of them,
`core/webhook_params.py` and `core/webhook_urls.py` check what callers give, `adapters/webhooks/` signs and sends.
Bodies are OpenAI's, signatures those of Standard Webhooks, so that `client.webhooks.unwrap()` takes them (contract F).
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from vllm_batch_dagster.core.creation import ID_BYTES, Randomness
from vllm_batch_dagster.core.models import DAY_SECONDS

EVENT_TYPES = ("batch.completed", "batch.failed", "batch.cancelled", "batch.expired")
ENDPOINT_KIND = "webhook endpoint"  # in NotFound
METADATA_KEY = "webhook_url"  # of a batch: one more target, for this batch only
METADATA_TARGET = "webhook:metadata"
TARGET_PREFIX = "webhook:"

SECRET_PREFIX = "whsec_"
SECRET_BYTES = 32
SHOWN_CHARACTERS = 4
OVERLAP_SECONDS = DAY_SECONDS  # how long the secret before a rotation goes on, when asked for (contract F.5)

FIRST_RETRY_SECONDS = 5
LONGEST_PAUSE_SECONDS = 4 * 3600
GIVE_UP_SECONDS = 3 * DAY_SECONDS  # contract F.4
JITTER = 0.2


@dataclass(frozen=True, slots=True)
class SigningSecret:
    """A secret, and the one before a rotation with the second until which it signs too. Never printed."""

    current: str = field(repr=False)
    old: str | None = field(default=None, repr=False)
    old_until: int | None = None

    def active(self, now: float) -> tuple[str, ...]:
        """The secrets that sign at `now` (unix seconds), the newest first."""
        if self.old is None or self.old_until is None or now >= self.old_until:
            return (self.current,)
        return (self.current, self.old)

    def rotated(self, new: str, now: int, *, keep_old: bool) -> "SigningSecret":
        """Return the pair after a rotation at `now`; without `keep_old` the present secret ends at once."""
        return SigningSecret(new, self.current, now + OVERLAP_SECONDS) if keep_old else SigningSecret(new)


@dataclass(frozen=True, slots=True)
class WebhookEndpoint:
    """A registered receiver. `updated_at` is the last change of its settings or secret; times in unix seconds."""

    id: str
    project_id: str
    name: str
    url: str
    event_types: tuple[str, ...]
    secret: SigningSecret
    created_at: int
    updated_at: int


@dataclass(frozen=True, slots=True)
class WebhookTarget:
    """Where one event goes. `key` is stable: `webhook:<endpoint id>` or `webhook:metadata`; `url` is to be shown."""

    key: str
    url: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one attempt. `status` is the receiver's, None when no answer came; `reason` says why it is not
    delivered and holds no secret. `is_final`: another attempt is of no use, the target is gone."""

    is_delivered: bool
    status: int | None = None
    reason: str = ""
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class EndpointParams:
    """Checked parameters of an endpoint; None where the caller says nothing (an update)."""

    name: str | None = None
    url: str | None = None
    event_types: tuple[str, ...] | None = None


def webhook_id(event_id: str) -> str:
    """Return the `webhook-id` of an event: the same for every attempt, so that receivers can tell repeats."""
    return f"wh_{event_id.removeprefix('evt_')}"


def event_body(event_id: str, kind: str, created_at: int, batch_id: str) -> bytes:
    """Return the bytes that are signed and sent (contract F.1). `created_at`: when the batch reached its state."""
    data = {"id": batch_id}
    return msgspec.json.encode(
        {"object": "event", "id": event_id, "type": kind, "created_at": created_at, "data": data}
    )


def is_delivered(status: int) -> bool:
    """Any 2xx is (contract F.4); a redirect is not, and is not followed."""
    return 200 <= status < 300


def next_attempt(event_id: str, attempts: int, since: float, now: float) -> float | None:
    """Return when to try again after `attempts` (1 or more) that failed, None when it is over.

    `since` is when delivering began: the time of the event, or of a replay. All in unix seconds. The pauses double
    from about 5 s to 4 h, each up to a fifth longer or shorter so that the events of one outage do not come back
    at once; the last attempt is 72 h after `since`.
    """
    end = since + GIVE_UP_SECONDS
    if now >= end:
        return None
    doublings = min(attempts - 1, 32)
    pause = min(FIRST_RETRY_SECONDS << doublings, LONGEST_PAUSE_SECONDS)
    return min(now + pause * _spread(event_id, attempts), end)


def _spread(event_id: str, attempts: int) -> float:
    """A factor from 0.8 to 1.2, always the same for one attempt at one event."""
    digest = hashlib.sha256(f"{event_id}/{attempts}".encode()).digest()
    return 1 + JITTER * (int.from_bytes(digest[:4], "big") / 2**31 - 1)


def new_signing_secret(randomness: Randomness) -> str:
    """Return `whsec_` and 32 random bytes in padded base64: the client decodes nothing else (contract F.3)."""
    return SECRET_PREFIX + b64encode(randomness(SECRET_BYTES)).decode()


def secret_hint(secret: str) -> str:
    """Return what may be shown of a secret: enough to tell two apart."""
    return f"{SECRET_PREFIX}...{secret.rstrip('=')[-SHOWN_CHARACTERS:]}"


def make_endpoint(params: EndpointParams, project_id: str, randomness: Randomness, now: int) -> WebhookEndpoint:
    """Return a new endpoint with a secret. All three of `params` must be given."""
    return WebhookEndpoint(
        id=f"we_{randomness(ID_BYTES).hex()}",
        project_id=project_id,
        name=params.name or "",
        url=params.url or "",
        event_types=params.event_types or (),
        secret=SigningSecret(new_signing_secret(randomness)),
        created_at=now,
        updated_at=now,
    )


def change_endpoint(endpoint: WebhookEndpoint, changes: EndpointParams, now: int) -> WebhookEndpoint:
    """Return the endpoint with `changes`; its `updated_at` moves only when something differs."""
    changed = replace(
        endpoint,
        name=endpoint.name if changes.name is None else changes.name,
        url=endpoint.url if changes.url is None else changes.url,
        event_types=endpoint.event_types if changes.event_types is None else changes.event_types,
    )
    return endpoint if changed == endpoint else replace(changed, updated_at=max(now, endpoint.updated_at))


def rotate_endpoint(endpoint: WebhookEndpoint, new: str, now: int, *, keep_old: bool) -> WebhookEndpoint:
    secret = endpoint.secret.rotated(new, now, keep_old=keep_old)
    return replace(endpoint, secret=secret, updated_at=max(now, endpoint.updated_at))


def batch_target(metadata: Mapping[str, str] | None) -> WebhookTarget | None:
    """Return the target that a batch itself names."""
    url = (metadata or {}).get(METADATA_KEY)
    return WebhookTarget(METADATA_TARGET, url) if url is not None else None


def endpoint_target(endpoint: WebhookEndpoint) -> WebhookTarget:
    return WebhookTarget(TARGET_PREFIX + endpoint.id, endpoint.url)
