"""Chooses the loopback port that a new engine listens on."""

import socket

HOST = "127.0.0.1"


def pick_port(preferred: int) -> int:
    """Return `preferred` if nobody listens there, else a free port. 0 prefers none. Raises OSError."""
    try:
        return _bind(preferred)
    except OSError:
        return _bind(0)


def _bind(port: int) -> int:
    with socket.socket() as probe:
        # Without it a port whose last connections are still in TIME_WAIT counts as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        probe.listen(1)
        return int(probe.getsockname()[1])
