"""Sends the events of batches over HTTP. Built by composition.py, called by stages/webhooks.py."""

from vllm_batch_dagster.adapters.webhooks.sender import HttpWebhookSender

__all__ = ["HttpWebhookSender"]
