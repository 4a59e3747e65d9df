"""Polls the API ten times a second and judges what it says of each batch over time. One thread for all batches."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from vllm_batch_dagster.core.states import TIMESTAMP_FIELD, TRANSITIONS, BatchStatus

POLL_SECONDS = 0.1
_PAGE = 100


@dataclass
class Path:
    """What was seen of one batch."""

    statuses: list[BatchStatus] = field(default_factory=list)
    answered: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, batch: Mapping[str, Any]) -> None:
        status = BatchStatus(batch["status"])
        if not self.statuses or self.statuses[-1] is not status:
            if self.statuses and status not in reachable(self.statuses[-1]):
                self.problems.append(f"{self.statuses[-1].value} became {status.value}")
            self.statuses.append(status)
        counts = batch["request_counts"] or {"completed": 0, "failed": 0}
        answered = counts["completed"] + counts["failed"]
        if answered < self.answered:
            self.problems.append(f"{self.answered} answered lines became {answered} ({status.value})")
        self.answered = answered
        marks = [
            batch["created_at"],
            *(batch[TIMESTAMP_FIELD[each]] for each in self.statuses if each in TIMESTAMP_FIELD),
        ]
        if None in marks or marks != sorted(marks):
            self.problems.append(f"timestamps {marks} along {[each.value for each in self.statuses]}")


def reachable(status: BatchStatus) -> frozenset[BatchStatus]:
    """Return the statuses that a batch can have later: the observer may blink, or the API be away for a while."""
    found: set[BatchStatus] = set()
    waiting = [status]
    while waiting:
        here = waiting.pop()
        new = {after for (before, _event), after in TRANSITIONS.items() if before is here} - found
        found |= new
        waiting.extend(new)
    return frozenset(found)


class Observer:
    """Watches the newest hundred batches of an API from `start` to `stop`."""

    def __init__(self, api_url: str) -> None:
        self._url = f"{api_url}/batches"
        self._paths: dict[str, Path] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="observer", daemon=True)
        self.looks = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def path(self, batch_id: str) -> Path:
        return self._paths.get(batch_id, Path())

    def _watch(self) -> None:
        with httpx2.Client(timeout=10) as client:
            while not self._stop.wait(POLL_SECONDS):
                try:
                    answer = client.get(self._url, params={"limit": _PAGE})
                except httpx2.TransportError:
                    continue  # the API may be dead: it is one of the faults
                if answer.status_code == 200:
                    self.looks += 1
                    for batch in answer.json()["data"]:
                        self._paths.setdefault(batch["id"], Path()).add(batch)
