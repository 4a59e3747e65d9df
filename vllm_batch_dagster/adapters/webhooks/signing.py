"""The headers of one attempt, signed as Standard Webhooks says and `client.webhooks.unwrap()` checks (contract F.3)."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from standardwebhooks import Webhook


def sign(webhook_id: str, timestamp: int, body: bytes, secrets: Sequence[str]) -> Mapping[str, str]:
    """Return the three headers for exactly these bytes (UTF-8). One signature for each secret; any of them passes."""
    at = datetime.fromtimestamp(timestamp, UTC)
    signatures = (Webhook(secret).sign(webhook_id, at, body.decode()) for secret in secrets)
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }
