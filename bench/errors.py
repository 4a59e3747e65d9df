"""The one error of the measuring program."""


class BenchFailed(Exception):
    """A measurement cannot be trusted or made; the message says why."""
