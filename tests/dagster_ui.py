"""What the Dagster UI asks and does, through the GraphQL API of a running webserver."""

from collections.abc import Mapping, Sequence
from typing import Any

import httpx

LOCATION = {"repositoryLocationName": "vllm_batch_dagster", "repositoryName": "__repository__"}

MATERIALIZATIONS = """
query ($key: AssetKeyInput!, $partition: String!) {
  assetNodeOrError(assetKey: $key) { ... on AssetNode { assetMaterializations(partitions: [$partition]) {
    runId timestamp metadataEntries {
      label ... on IntMetadataEntry { intValue } ... on FloatMetadataEntry { floatValue }
      ... on TextMetadataEntry { text } } } } } }
"""
RUNS = """
query ($filter: RunsFilter!) { runsOrError(filter: $filter) { ... on Runs { results {
  runId status jobName parentRunId creationTime startTime endTime tags { key value } } } } }
"""
BACKFILL = """
mutation ($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }
"""


class DagsterUi:
    """A webserver. `url` without a path."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/graphql"

    def ask(self, query: str, **variables: object) -> Any:
        """Return the `data` of an answer."""
        answer = httpx.post(self._url, json={"query": query, "variables": variables}, timeout=120).json()
        assert "errors" not in answer, answer
        return answer["data"]

    def materializations(self, asset: str, partition: str) -> Sequence[Mapping[str, Any]]:
        """Return run id and plain metadata of each materialization of a partition, newest first."""
        node = self.ask(MATERIALIZATIONS, key={"path": [asset]}, partition=partition)["assetNodeOrError"]
        return [
            {"run": event["runId"], "at": int(event["timestamp"]), **read_metadata(event["metadataEntries"])}
            for event in node["assetMaterializations"]
        ]

    def runs(self, batch_id: str) -> Sequence[Mapping[str, Any]]:
        """Return the runs of a batch that our sensor asked for, newest first."""
        wanted = {"tags": [{"key": "batch", "value": batch_id}]}
        runs: Sequence[Mapping[str, Any]] = self.ask(RUNS, filter=wanted)["runsOrError"]["results"]
        return runs

    def rerun(self, asset: str, partitions: Sequence[str]) -> str:
        """Materialize partitions of one asset as the button in the UI does. Returns the backfill's id."""
        params = {
            "selector": None,
            "assetSelection": [{"path": [asset]}],
            "partitionNames": list(partitions),
            "fromFailure": False,
            "tags": [],
        }
        started = self.ask(BACKFILL, params=params)["launchPartitionBackfill"]
        assert started["__typename"] == "LaunchBackfillSuccess", started
        return str(started["backfillId"])


def read_metadata(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return label -> value of the entries that are numbers or texts."""
    values = {}
    for entry in entries:
        for kind in ("intValue", "floatValue", "text"):
            if kind in entry:
                values[entry["label"]] = entry[kind]
    return values
