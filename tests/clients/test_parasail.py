"""Parasail's `openai-batch` beyond the checklist: embeddings, and its command line against a lenient server."""

import json
from pathlib import Path

import openai
import pytest

from tests.clients.environments import python_of
from tests.clients.runs import PARASAIL_CLI, Clients
from tests.conformance.inputs import embed
from tests.conformance.submissions import TERMINAL
from tests.stack import wait_for
from tests.target import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS = 800


def test_embeddings(clients: Clients) -> None:
    result = clients["embeddings"].result()
    assert (result["status"], result["errors"]) == ("completed", None)
    lines = [json.loads(line) for line in (clients["embeddings"].folder / result["output"]).read_text().splitlines()]
    inputs = {line["custom_id"]: len(line["response"]["body"]["data"]) for line in lines}
    assert inputs == {"line-1": 1, "line-2": 2}


def test_the_command_line_says_chat_for_every_file(target: Target, clients: Clients, tmp_path: Path) -> None:
    """It sends the endpoint of chat whatever the lines are for: a server in lenient mode runs them all the same."""
    source = tmp_path / "lines.jsonl"
    source.write_text("".join(json.dumps(embed(number, target.embedding_model)) + "\n" for number in (1, 2)))
    where = ("--base-url", target.extended_url, "--api-key", target.extended_key)
    cli, python = ("-m", "openai_batch.run"), python_of(PARASAIL_CLI)

    created = clients.start("create", python, *cli, *where, "--create", str(source)).said()
    batch_id = created.split("Created ")[1].split(".")[0]
    with openai.OpenAI(base_url=target.extended_url, api_key=target.extended_key) as extended:
        wait_for(lambda: extended.batches.retrieve(batch_id).status in TERMINAL, SECONDS)
        assert extended.batches.retrieve(batch_id).endpoint == "/v1/chat/completions"
    resumed = clients.start("resume", python, *cli, *where, "--resume", batch_id)

    assert f"Status of {batch_id}: completed" in resumed.said()
    lines = (resumed.folder / f"{batch_id}-output.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"]["body"]["object"] for line in lines] == ["list", "list"]
    assert not (resumed.folder / f"{batch_id}-errors.jsonl").exists()
