"""Asks a running Dagster for runs, as its launchpad does, and waits for them. Used by the demo of the curation."""

import json
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

from scripts.stack import POLL_SECONDS, Stack, StackFailed

_SELECTOR = {"repositoryLocationName": "vllm_batch_dagster", "repositoryName": "__repository__"}
_LAUNCH = """
mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename
  ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } } } }
"""
_STATUS = "query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
_ENDED = frozenset({"SUCCESS", "FAILURE", "CANCELED"})
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def launch(
    stack: Stack, job: str, *, config: Mapping[str, Any] | None = None, partition: str = "", seconds: float = 300
) -> str:
    """Run a job to its end. Returns the run's id. Raises StackFailed when it does not succeed in time."""
    tags = [{"key": "dagster/partition", "value": partition}] if partition else []
    params = {
        "selector": {**_SELECTOR, "jobName": job},
        "runConfigData": dict(config or {}),
        "executionMetadata": {"tags": tags},
        "mode": "default",
    }
    said = ask(stack, _LAUNCH, params=params)["launchRun"]
    if said["__typename"] != "LaunchRunSuccess":
        raise StackFailed(f"Dagster does not run {job}: {said}")
    run_id = str(said["run"]["runId"])
    _wait(stack, job, run_id, seconds)
    return run_id


def ask(stack: Stack, query: str, **variables: object) -> Any:
    """Return the data of a GraphQL query. Raises StackFailed."""
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(
        f"{stack.dagster_url}/graphql", data=body, headers={"Content-Type": "application/json"}
    )
    with _direct.open(request, timeout=60) as response:
        said = json.load(response)
    if "errors" in said:
        raise StackFailed(f"Dagster refuses: {said['errors'][0]['message']}")
    return said["data"]


def _wait(stack: Stack, job: str, run_id: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (status := ask(stack, _STATUS, id=run_id)["runOrError"]["status"]) not in _ENDED:
        stack.check_alive()
        if time.monotonic() > deadline:
            raise StackFailed(f"{job} did not end within {seconds:.0f} s: {stack.dagster_url}/runs/{run_id}")
        time.sleep(POLL_SECONDS)
    if status != "SUCCESS":
        raise StackFailed(f"{job} ended as {status}: see {stack.log}")
