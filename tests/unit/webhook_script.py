"""What the tests of the webhook sender share: one event, and a receiver that answers by a script."""

import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_batch_dagster.adapters.webhooks import HttpWebhookSender
from vllm_batch_dagster.core.webhook_urls import read_allowed_hosts
from vllm_batch_dagster.core.webhooks import Outcome, event_body, new_signing_secret

NOW = 1_700_000_000
BODY = event_body("evt_1", "batch.completed", NOW, "batch_ü")
SECRETS = [new_signing_secret(lambda count, start=start: bytes(range(start, start + count))) for start in (0, 64)]
LOOPBACK = read_allowed_hosts("127.0.0.1")
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

TLS_HELLO = b"\x16\x03"


@dataclass
class Script:
    """A server on loopback that answers every request with `answer`, and remembers the requests."""

    answer: bytes | Callable[[socket.socket], None] = OK
    tls: ssl.SSLContext | None = None
    requests: list[bytes] = field(default_factory=list)
    hosts: list[str | None] = field(default_factory=list)
    port: int = 0

    def __enter__(self) -> "Script":
        script = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    script.serve(self.request)
                except OSError:
                    """The client has gone."""

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self, connection: socket.socket) -> None:
        if self.tls is not None:
            connection = self.tls.wrap_socket(connection, server_side=True)
        received = b""
        while b"\r\n\r\n" not in received or not received.endswith(BODY):
            data = connection.recv(65_536)
            if not data:
                return
            received += data
            if received.startswith(TLS_HELLO):
                return  # to one that speaks plain HTTP: no reason to let the client wait
        self.requests.append(received)
        if callable(self.answer):
            self.answer(connection)
        else:
            connection.sendall(self.answer)
        connection.close()

    def url(self, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}/hook?a=%20b"


def send(url: str, made: HttpWebhookSender | None = None, secrets: Sequence[str] = SECRETS[:1]) -> Outcome:
    return (made or HttpWebhookSender(LOOPBACK)).send(url, "evt_1", BODY, secrets, NOW)
