"""Progress lines in the terminal: seconds since the start, and what happens."""

import time

_began = time.monotonic()


def say(words: str) -> None:
    print(f"[{time.monotonic() - _began:7.1f} s] {words}", flush=True)
