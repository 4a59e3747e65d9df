"""Handlers and webhooks for the tests of the `deliveries` asset, and what the store and the sensor say afterwards."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from handlers.base import ResultHandler, Results
from handlers.registry import BrokenHandler
from tests.defs.graph import Graph
from vllm_batch_dagster.core.deliveries import DeliveryRecord, DeliveryState

DEAD, DELIVERED, PENDING = DeliveryState.DEAD, DeliveryState.DELIVERED, DeliveryState.PENDING


class Handler(ResultHandler):
    """Notes what it is given, and answers or raises `outcome`."""

    def __init__(self, name: str, outcome: object = True, *, enabled: bool = True) -> None:
        self._name, self.outcome, self._enabled = name, outcome, enabled
        self.given: list[tuple[str, list[str], Mapping[str, str]]] = []

    def name(self) -> str:
        return self._name

    def enabled(self) -> bool:
        return self._enabled

    def handle(self, batch_id: str, results: Results, metadata: Mapping[str, str]) -> bool:
        self.given.append((batch_id, [row["custom_id"] for row in results], metadata))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return bool(self.outcome)


def install(monkeypatch: pytest.MonkeyPatch, handlers: Sequence[ResultHandler | BrokenHandler]) -> None:
    monkeypatch.setattr("handlers.courier.load_handlers", lambda modules: list(handlers))


def kept(graph: Graph, batch_id: str) -> dict[str, DeliveryRecord]:
    return {each.target: each for each in graph.services.store.deliveries.of_batch(batch_id)}


def states(graph: Graph, batch_id: str) -> dict[str, DeliveryState]:
    return {target: each.state for target, each in kept(graph, batch_id).items()}


def asked(graph: Graph, batch_id: str) -> list[dg.RunRequest]:
    """Return what the sensor asks for this batch."""
    return [request for request in graph.tick().run_requests or () if request.tags["batch"] == batch_id]


def by_hand(graph: Graph, batch_id: str, **config: Any) -> dg.JobExecutionResult:
    """Run the partition as the UI does, with what the launchpad says."""
    definition = graph.definitions.resolve_job_def("deliver_batch")
    run = graph.instance.create_run_for_job(
        definition, run_config={"ops": {"deliveries": {"config": config}}}, tags={"dagster/partition": batch_id}
    )
    return execute_run(InMemoryJob(definition), run, graph.instance)
