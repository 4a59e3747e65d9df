"""Webhook endpoints and signing secrets in memory."""

from collections.abc import Sequence

from vllm_batch_dagster.adapters.memory.tables import Tables, by_time, take_page, within
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import Page
from vllm_batch_dagster.core.webhooks import (
    ENDPOINT_KIND,
    EndpointParams,
    SigningSecret,
    WebhookEndpoint,
    change_endpoint,
    rotate_endpoint,
)


class MemoryWebhookRecords:
    """See WebhookRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def add(self, endpoint: WebhookEndpoint) -> None:
        with self._tables.lock:
            if endpoint.id in self._tables.webhooks:
                raise StateConflict(f"a webhook endpoint with this id exists already: {endpoint.id}")
            self._tables.webhooks[endpoint.id] = endpoint

    def get(self, endpoint_id: str, *, project_id: str | None = None) -> WebhookEndpoint:
        with self._tables.lock:
            endpoint = self._tables.webhooks.get(endpoint_id)
        if endpoint is None or project_id not in (None, endpoint.project_id):
            raise NotFound(ENDPOINT_KIND, endpoint_id)
        return endpoint

    def list(
        self, *, after: str | None = None, limit: int = 20, project_id: str | None = None
    ) -> Page[WebhookEndpoint]:
        with self._tables.lock:
            ordered = by_time(within(self._tables.webhooks.values(), project_id), descending=True)
        return take_page(ordered, ordered, kind=ENDPOINT_KIND, after=after, limit=limit)

    def listening(self, project_id: str, event_type: str) -> Sequence[WebhookEndpoint]:
        with self._tables.lock:
            ordered = by_time(within(self._tables.webhooks.values(), project_id))
        return [endpoint for endpoint in ordered if event_type in endpoint.event_types]

    def change(self, endpoint_id: str, changes: EndpointParams, now: int) -> WebhookEndpoint:
        with self._tables.lock:
            changed = change_endpoint(self.get(endpoint_id), changes, now)
            self._tables.webhooks[endpoint_id] = changed
            return changed

    def rotate(self, endpoint_id: str, new: str, now: int, *, keep_old: bool) -> WebhookEndpoint:
        with self._tables.lock:
            rotated = rotate_endpoint(self.get(endpoint_id), new, now, keep_old=keep_old)
            self._tables.webhooks[endpoint_id] = rotated
            return rotated

    def delete(self, endpoint_id: str) -> None:
        with self._tables.lock:
            if self._tables.webhooks.pop(endpoint_id, None) is None:
                raise NotFound(ENDPOINT_KIND, endpoint_id)

    def project_secret(self, project_id: str, new: str) -> SigningSecret:
        with self._tables.lock:
            return self._tables.webhook_secrets.setdefault(project_id, SigningSecret(new))

    def rotate_project_secret(self, project_id: str, new: str, now: int, *, keep_old: bool) -> SigningSecret:
        with self._tables.lock:
            known = self.project_secret(project_id, new)
            if known.current != new:
                known = self._tables.webhook_secrets[project_id] = known.rotated(new, now, keep_old=keep_old)
            return known
