"""Signals that end `vllm-batch up`: Ctrl-C, SIGTERM, a closed terminal. The first stops, the second kills."""

import signal
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Counts stop signals. Handlers do nothing else, so they are safe at any point of the program."""

    def __init__(self) -> None:
        self._count = 0

    @property
    def is_stopping(self) -> bool:
        return self._count > 0

    @property
    def is_hurried(self) -> bool:
        """True after a second signal: stop waiting for anything."""
        return self._count > 1

    def install(self) -> None:
        """Take the signals over.

        Children then start with the default action, whatever we were started with: a service that inherits an
        ignored SIGINT (`vllm-batch up &` in a script) would ignore SIGTERM too, because Dagster maps one to the
        other. An ignored SIGHUP is left alone: somebody used nohup.
        """
        for number in STOPPING:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            signal.signal(number, self._count_one)

    def _count_one(self, _number: int, _frame: FrameType | None) -> None:
        self._count += 1
