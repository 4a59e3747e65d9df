"""One attempt over real sockets: what arrives, and what the receiver can do wrong."""

import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.webhooks import BatchCompletedWebhookEvent

from tests.conformance.receiver import Receiver
from tests.unit.webhook_script import BODY, NOW, SECRETS, Script, send
from vllm_batch_dagster.adapters.webhooks import sender
from vllm_batch_dagster.core.webhooks import Outcome


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "TOTAL_SECONDS", 0.5)


def unwrap(body: bytes, headers: Any, secret: str) -> Any:
    """Take a delivery as the official client does at the moment at which it was signed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("openai.lib._webhooks.time.time", lambda: NOW)
        return openai.OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=secret)


def test_what_arrives_is_what_the_official_client_takes(receiver: Receiver) -> None:
    outcome = send(f"{receiver.url}/ok")
    assert outcome == Outcome(is_delivered=True, status=200)

    (delivery,) = receiver.got("ok")
    assert delivery.body == BODY
    assert delivery.headers["content-type"] == "application/json"
    assert delivery.headers["user-agent"] == "vllm-batch-dagster (webhooks)"
    assert delivery.id == "wh_1"
    assert delivery.headers["webhook-timestamp"] == str(NOW)
    event = unwrap(delivery.body, delivery.headers, SECRETS[0])
    assert isinstance(event, BatchCompletedWebhookEvent)
    assert event.data.id == "batch_ü"


def test_two_secrets_make_two_signatures_that_both_hold(receiver: Receiver) -> None:
    send(f"{receiver.url}/ok", secrets=SECRETS)
    (delivery,) = receiver.got("ok")
    signatures = delivery.headers["webhook-signature"].split(" ")
    assert [signature[:3] for signature in signatures] == ["v1,", "v1,"]
    for secret in SECRETS:
        unwrap(delivery.body, delivery.headers, secret)


def test_a_changed_body_or_secret_is_refused(receiver: Receiver) -> None:
    send(f"{receiver.url}/ok")
    (delivery,) = receiver.got("ok")
    for body, secret in ((delivery.body + b" ", SECRETS[0]), (delivery.body, SECRETS[1])):
        with pytest.raises(openai.InvalidWebhookSignatureError, match="does not match"):
            unwrap(body, delivery.headers, secret)


@pytest.mark.parametrize("name", ["ok", "empty"])
def test_any_2xx_is_taken(receiver: Receiver, name: str) -> None:
    assert send(f"{receiver.url}/{name}").is_delivered


def test_a_refusal_is_told_with_its_words() -> None:
    answer = b"HTTP/1.1 500 No\r\ncontent-length: 11\r\n\r\nno\x1b[2J\nway!"
    with Script(answer) as script:
        outcome = send(script.url())
    assert outcome == Outcome(is_delivered=False, status=500, reason="answered 500 no [2J way!")


def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    outcome = send(f"{receiver.url}/redirect")
    assert (outcome.is_delivered, outcome.status) == (False, 302)
    assert "not followed" in outcome.reason
    assert receiver.got("ok") == []


@pytest.mark.usefixtures("hurried")
def test_a_receiver_that_hangs_is_given_up(receiver: Receiver) -> None:
    outcome = send(f"{receiver.url}/hang")
    assert (outcome.is_delivered, outcome.status) == (False, None)
    assert "no answer from 127.0.0.1 within" in outcome.reason


def drip(connection: socket.socket) -> None:
    """Send an answer that never ends, a byte at a time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
    for _ in range(200):
        connection.sendall(b"a")
        time.sleep(0.05)


@pytest.mark.usefixtures("hurried")
def test_a_receiver_that_drips_is_given_up() -> None:
    with Script(drip) as script:
        assert "no answer from 127.0.0.1 within" in send(script.url()).reason


def pour(connection: socket.socket) -> None:
    """Send an answer of a gigabyte, as far as the client lets us."""
    connection.sendall(b"HTTP/1.1 503 Full\r\ncontent-encoding: gzip\r\ncontent-length: 1073741824\r\n\r\n")
    poured.clear()
    for _ in range(1024):
        connection.sendall(bytes(1 << 20))
        poured.append(1)


poured: list[int] = []


def test_of_a_long_answer_little_is_read() -> None:
    with Script(pour) as script:
        outcome = send(script.url())
    assert outcome.status == 503
    assert len(outcome.reason) < 300
    assert len(poured) < 100


def test_a_compressed_answer_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(10 << 20))
    head = f"HTTP/1.1 400 Bad\r\ncontent-encoding: gzip\r\ncontent-length: {len(bomb)}\r\n\r\n".encode()
    with Script(head + bomb) as script:
        assert send(script.url()).status == 400


def test_the_status_counts_even_if_the_body_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "BODY_SECONDS", 0.1)

    def stop_short(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 500 No\r\ncontent-length: 10\r\n\r\n")
        time.sleep(1)

    with Script(stop_short) as script:
        assert send(script.url()) == Outcome(is_delivered=False, status=500, reason="answered 500")


@pytest.mark.parametrize(
    "answer", [b"", b"\0\1\2 nonsense\r\n\r\n", b"HTTP/1.1 999999 X\r\n\r\n", b"HTTP/1.1 200 OK\r\nx"]
)
def test_a_receiver_that_breaks_off_or_speaks_nonsense(answer: bytes) -> None:
    with Script(answer) as script:
        outcome = send(script.url())
    assert (outcome.is_delivered, outcome.status, outcome.is_final) == (False, None, False)
    assert outcome.reason.startswith("no answer from 127.0.0.1: ")
    assert "hook" not in outcome.reason, "a URL may hold a secret of its own"


def test_a_port_that_nobody_listens_at() -> None:
    with Script() as script:
        url = script.url()
    assert send(url).reason.startswith("no answer from 127.0.0.1: ")


def test_nothing_of_a_secret_is_in_an_outcome(receiver: Receiver) -> None:
    outcomes = [send(f"{receiver.url}/{name}", secrets=SECRETS) for name in ("error", "redirect")]
    text = json.dumps([outcome.reason for outcome in outcomes])
    assert not any(secret[6:] in text for secret in SECRETS)
