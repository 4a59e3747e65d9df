"""What webhooks need from the outside world: records, which the batch store takes in in `ports.py`, and a sender."""

from collections.abc import Sequence
from typing import Protocol

from vllm_batch_dagster.core.models import Page
from vllm_batch_dagster.core.webhooks import EndpointParams, Outcome, SigningSecret, WebhookEndpoint


class WebhookRecords(Protocol):
    """Registered endpoints with their secrets, and the secret of each project for the URLs in its batches' metadata.
    Everything that takes a `project_id` knows nothing of other projects (None: all projects)."""

    def add(self, endpoint: WebhookEndpoint) -> None:
        """Store a new endpoint durably. Raises StateConflict when the id is taken."""

    def get(self, endpoint_id: str, *, project_id: str | None = None) -> WebhookEndpoint:
        """Raises NotFound("webhook endpoint", id)."""

    def list(
        self, *, after: str | None = None, limit: int = 20, project_id: str | None = None
    ) -> Page[WebhookEndpoint]:
        """Newest first. `after` is exclusive. Unknown `after`: NotFound."""

    def listening(self, project_id: str, event_type: str) -> Sequence[WebhookEndpoint]:
        """The endpoints of a project that want this type of event, oldest first."""

    def change(self, endpoint_id: str, changes: EndpointParams, now: int) -> WebhookEndpoint:
        """Set what `changes` names. `updated_at` moves only when something differs. Raises NotFound."""

    def rotate(self, endpoint_id: str, new: str, now: int, *, keep_old: bool) -> WebhookEndpoint:
        """Replace the secret (SigningSecret.rotated). Raises NotFound."""

    def delete(self, endpoint_id: str) -> None:
        """Raises NotFound."""

    def project_secret(self, project_id: str, new: str) -> SigningSecret:
        """The secret of a project. `new` becomes it when there is none yet; two callers at once get the same."""

    def rotate_project_secret(self, project_id: str, new: str, now: int, *, keep_old: bool) -> SigningSecret:
        """Replace the secret of a project, or set its first one."""


class WebhookSender(Protocol):
    """Makes one attempt."""

    def send(self, url: str, event_id: str, body: bytes, secrets: Sequence[str], timestamp: int) -> Outcome:
        """POST `body`, signed with each of `secrets` for `timestamp` (unix seconds). Takes at most 10 s and raises
        nothing that the URL or its receiver is to blame for."""
