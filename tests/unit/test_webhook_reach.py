"""Where an attempt never goes: names that resolve into this network, other notations, rebinding, other certificates."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.webhook_script import Script, send
from vllm_batch_dagster.adapters.webhooks import HttpWebhookSender, sender
from vllm_batch_dagster.core.webhook_urls import NO_HOSTS, read_allowed_hosts


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "TOTAL_SECONDS", 0.5)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own name server may take longer to say no than an attempt may last."""
    monkeypatch.setattr(sender, "TOTAL_SECONDS", 50)


@pytest.mark.usefixtures("patient")
def test_a_name_that_does_not_exist() -> None:
    outcome = send("https://no-such-name.invalid/hook", HttpWebhookSender())
    assert outcome.reason.startswith("refused: the host no-such-name.invalid cannot be resolved")
    assert not outcome.is_final


@pytest.mark.parametrize("host", ["xn--999999999", "xn--", "a" * 63 + ".invalid", "-.invalid", "under_score.invalid"])
@pytest.mark.usefixtures("patient")
def test_a_name_that_no_system_likes(host: str) -> None:
    assert send(f"https://{host}/hook", HttpWebhookSender()).reason.startswith("refused: ")


class Names:
    """A name server whose answers change: each look-up takes the next, the last one stays."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> list[tuple[int, str]]:
        self.asked.append(host)
        found = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        return [(int(socket.AF_INET6 if ":" in address else socket.AF_INET), address) for address in found]


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["100.64.0.1"],
        ["0.0.0.0"],
        ["::1"],
        ["::"],
        ["fe80::1%lo"],
        ["fd00::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["2002:7f00:1::"],
        ["224.0.0.1"],
        ["1.1.1.1", "127.0.0.1"],
        [],
    ],
)
def test_a_name_with_any_address_that_is_not_public_is_refused(addresses: list[str]) -> None:
    with Script() as script:
        outcome = send(script.url("receiver.example", "https"), HttpWebhookSender(ask=Names(addresses)))
        assert script.requests == []
    assert outcome.reason.startswith("refused: the host receiver.example has an address")
    assert not any(address in outcome.reason for address in addresses)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0177.0.0.1"])
def test_a_loopback_address_in_any_notation_is_refused(host: str) -> None:
    with Script() as script:
        for scheme in ("http", "https"):
            outcome = send(script.url(host, scheme), HttpWebhookSender(NO_HOSTS))
            assert "this URL cannot receive webhooks" in outcome.reason
        assert script.requests == []


def test_a_setting_that_was_taken_back_holds_for_old_urls() -> None:
    with Script() as script:
        assert send(script.url()).is_delivered
        assert not send(script.url(), HttpWebhookSender(NO_HOSTS)).is_delivered
        assert len(script.requests) == 1


def test_a_name_is_looked_up_once_and_the_connection_goes_where_was_checked() -> None:
    """Rebinding: the second answer would be another address."""
    with Script() as script:
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        pinned = HttpWebhookSender(read_allowed_hosts("rebound.example"), ask=names)
        assert send(script.url("rebound.example"), pinned).is_delivered
        assert len(script.requests) == 1
    assert names.asked == ["rebound.example"]


def test_a_name_that_is_rebound_between_attempts_is_refused() -> None:
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    hosts = read_allowed_hosts("127.0.0.1")
    with Script() as script:
        first, second = (
            send(script.url("rebound.example", "https"), HttpWebhookSender(hosts, ask=names)) for _ in range(2)
        )
    assert first.reason.startswith("no answer")  # it got as far as the TLS handshake
    assert second.reason.startswith("refused")


@pytest.mark.usefixtures("hurried")
def test_a_look_up_that_hangs_is_given_up() -> None:
    def ask(host: str, port: int) -> list[tuple[int, str]]:
        given_up.wait(50)
        return []

    given_up = threading.Event()
    outcome = send("https://slow.example/", HttpWebhookSender(ask=ask))
    given_up.set()
    assert "no answer from slow.example within" in outcome.reason


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for receiver.example, and its key, in one file. Needs the program openssl."""
    path = tmp_path_factory.mktemp("tls") / "receiver.pem"
    subject = ["-subj", "/CN=receiver.example", "-addext", "subjectAltName=DNS:receiver.example"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    made = subprocess.run([*command, "-keyout", "-", "-out", "-"], check=True, capture_output=True)
    path.write_bytes(made.stdout)
    return path


def test_tls_is_verified_by_name_at_the_pinned_address(certificate: Path) -> None:
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=str(certificate))
    with Script(tls=serving) as script:
        serving.sni_callback = lambda _socket, name, _context: script.hosts.append(name)
        hosts, names = read_allowed_hosts("127.0.0.1"), Names(["127.0.0.1"])
        good = HttpWebhookSender(hosts, ask=names, tls=trusting)
        assert send(script.url("receiver.example", "https"), good).is_delivered
        assert script.hosts == ["receiver.example"]
        (request,) = script.requests
        assert f"host: receiver.example:{script.port}\r\n" in request.decode().lower()

        other_name = send(script.url("other.example", "https"), good)
        unknown_authority = send(script.url("receiver.example", "https"), HttpWebhookSender(hosts, ask=names))
        assert len(script.requests) == 1
    for outcome in (other_name, unknown_authority):
        assert "Certificate" in outcome.reason
        assert not outcome.is_delivered
