"""Numbers 70 to 73 of the checklist: Parasail's `openai-batch`, unmodified, in environments of its own."""

import json

import openai
import pytest

from tests.clients.environments import python_of
from tests.clients.runs import PARASAIL, PARASAIL_CLI, Clients, program
from tests.conformance.submissions import Submissions
from tests.target import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def contents(client: openai.OpenAI, *file_ids: str | None) -> list[bytes]:
    return [client.files.content(file_id).content for file_id in file_ids if file_id is not None]


def test_h070_both_files_are_the_servers(clients: Clients, strict_client: openai.OpenAI) -> None:
    result = clients["chat"].result()
    batch = strict_client.batches.retrieve(result["batch"])
    assert result["status"] == batch.status == "completed"
    written = [(clients["chat"].folder / result[name]).read_bytes() for name in ("output", "errors")]
    assert written == contents(strict_client, batch.output_file_id, batch.error_file_id)
    assert [len(content.splitlines()) for content in written] == [1, 1]


def test_h071_score_and_rerank(clients: Clients, strict_client: openai.OpenAI) -> None:
    for kind, key in (("score", "data"), ("rerank", "results")):
        result = clients[kind].result()
        batch = strict_client.batches.retrieve(result["batch"])
        assert (result["status"], result["errors"], batch.endpoint) == ("completed", None, "/v1/score")
        lines = [json.loads(line) for line in (clients[kind].folder / result["output"]).read_text().splitlines()]
        assert sorted(line["custom_id"] for line in lines) == ["line-1", "line-2"]
        assert all(line["response"]["body"][key] for line in lines)


def test_h072_resume_on_the_command_line(
    target: Target, clients: Clients, submissions: Submissions, strict_client: openai.OpenAI
) -> None:
    batch = submissions.finish("mixed")
    where = ("--base-url", target.base_url, "--api-key", target.api_key)
    resumed = clients.start(
        "resume_mixed", python_of(PARASAIL_CLI), "-m", "openai_batch.run", "--resume", batch.id, *where
    )
    assert f"Status of {batch.id}: completed" in resumed.said()
    written = [(resumed.folder / f"{batch.id}-{name}.jsonl").read_bytes() for name in ("output", "errors")]
    assert written == contents(strict_client, batch.output_file_id, batch.error_file_id)


def test_h073_a_failed_batch_has_nothing_to_download(
    target: Target, clients: Clients, submissions: Submissions
) -> None:
    batch = submissions.finish("broken")
    arguments = (target.base_url, target.api_key, batch.id)
    client = clients.start("download", python_of(PARASAIL), program("parasail_download"), *arguments)
    assert client.result() == {"output": None, "errors": None}
