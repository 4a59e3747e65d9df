"""A receiver of webhooks: what it answers is in the path of its URL, what it got is remembered."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HANG_SECONDS = 30
FIRST_ANSWER = {"error": 500, "redirect": 302, "hang": 200, "empty": 204, "ok": 200}


@dataclass(frozen=True, slots=True)
class Delivery:
    """One request. `name` is the last part of the path."""

    name: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


class Receiver:
    """A server on loopback. An event's first delivery gets what the path says; every later one is taken."""

    def __init__(self) -> None:
        self._deliveries: list[Delivery] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def got(self, name: str, event_id: str | None = None) -> Sequence[Delivery]:
        """Return the deliveries to one path, of one event or of all."""
        return [one for one in list(self._deliveries) if one.name == name and event_id in (None, one.id)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(self, delivery: Delivery) -> int:
        """Remember a delivery and return the status of the answer."""
        is_first = not self.got(delivery.name, delivery.id)
        self._deliveries.append(delivery)
        if not is_first:
            return 200
        if delivery.name == "hang":
            time.sleep(HANG_SECONDS)
        return FIRST_ANSWER[delivery.name]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                self.send_response(receiver.take(Delivery(self.path.rpartition("/")[2], headers, body)))
                self.send_header("location", f"{receiver.url}/ok")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

        return Handler
