"""WEBHOOK_ALLOWED_HOSTS on its way from the environment to the sender."""

import pytest
from pydantic import ValidationError

from tests.conformance.receiver import Receiver
from vllm_batch_dagster.cli.main import describe_settings_error
from vllm_batch_dagster.composition import allowed_hosts, build_webhook_sender
from vllm_batch_dagster.core.webhook_urls import NO_HOSTS
from vllm_batch_dagster.core.webhooks import new_signing_secret
from vllm_batch_dagster.settings import Settings


def test_nothing_is_allowed_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEBHOOK_ALLOWED_HOSTS", raising=False)
    assert allowed_hosts(Settings()) == NO_HOSTS


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_ALLOWED_HOSTS", "10.0.0.0/99")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "WEBHOOK_ALLOWED_HOSTS" in describe_settings_error(caught.value)


def test_the_sender_goes_where_the_setting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver, secret = Receiver(), new_signing_secret(bytes)
    delivered = []
    for hosts in ("127.0.0.0/8", "localhost"):
        monkeypatch.setenv("WEBHOOK_ALLOWED_HOSTS", hosts)
        sender = build_webhook_sender(Settings())
        delivered.append(sender.send(f"{receiver.url}/ok", "evt_1", b"{}", [secret], 1).is_delivered)
    receiver.close()
    assert delivered == [True, False]
