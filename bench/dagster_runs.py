"""Reads the run records of a batch from the Dagster webserver (GraphQL)."""

import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchFailed

_QUERY = """query Runs($batch: String!) {
  runsOrError(filter: {tags: [{key: "batch", value: $batch}]}) {
    __typename
    ... on Runs { results { runId jobName status creationTime startTime endTime } }
  }
}"""
_POLL_SECONDS = 0.5
_END_SECONDS = 120
# Proxies of the environment are not meant for our own machine.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Run:
    """One run. Unix seconds: when the sensor asked for it, when its process began the job, when it ended."""

    job: str
    status: str
    created: float
    started: float
    ended: float

    @property
    def wall(self) -> float:
        return self.ended - self.created


def runs_by_job(dagster_url: str, batch_id: str) -> dict[str, Run]:
    """Return the one run of each job. Raises BenchFailed when a run failed or was repeated: no clean measurement."""
    runs = [_as_run(record) for record in _ask(dagster_url, batch_id)]
    by_job = {run.job: run for run in runs}
    if len(by_job) != len(runs) or any(run.status != "SUCCESS" for run in runs):
        raise BenchFailed(f"{batch_id} had retries: {[(run.job, run.status) for run in runs]}")
    return by_job


def refuse_failures(dagster_url: str, batch_id: str) -> None:
    """Raises BenchFailed when a run has failed: its retry may succeed, but is no clean measurement."""
    failed = [record["jobName"] for record in _ask(dagster_url, batch_id) if record["status"] == "FAILURE"]
    if failed:
        raise BenchFailed(f"a run of {batch_id} failed: {', '.join(failed)}")


def wait_until_over(dagster_url: str, batch_id: str, seconds: float = _END_SECONDS) -> None:
    """Return when every run of the batch has ended: deliveries and curation go on after `completed`."""
    deadline = time.monotonic() + seconds
    while any(record["endTime"] is None for record in _ask(dagster_url, batch_id)):
        if time.monotonic() > deadline:
            raise BenchFailed(f"the runs of {batch_id} do not end")
        time.sleep(_POLL_SECONDS)


def _as_run(record: Mapping[str, Any]) -> Run:
    return Run(
        record["jobName"],
        record["status"],
        record["creationTime"],
        record["startTime"] or 0.0,
        record["endTime"] or 0.0,
    )


def _ask(dagster_url: str, batch_id: str) -> Sequence[Mapping[str, Any]]:
    request = urllib.request.Request(
        f"{dagster_url}/graphql",
        data=json.dumps({"query": _QUERY, "variables": {"batch": batch_id}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with _direct.open(request, timeout=30) as response:
        answer = json.load(response)
    found = (answer.get("data") or {}).get("runsOrError") or {}
    if found.get("__typename") != "Runs":
        raise BenchFailed(f"Dagster does not list the runs of {batch_id}: {answer}")
    results: Sequence[Mapping[str, Any]] = found["results"]
    return results
