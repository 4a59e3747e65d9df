"""The two code examples of the README, and the `openai` package: the oldest that has to work, and the newest."""

import json
from importlib.metadata import version

import openai
import pytest

from tests.clients.runs import Clients
from tests.conformance.submissions import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_example_with_requests(clients: Clients, strict_client: openai.OpenAI) -> None:
    result = clients["readme_requests"].result()
    assert result["status"] == "completed"
    output = (clients["readme_requests"].folder / "batch_output.jsonl").read_bytes()
    batch = strict_client.batches.retrieve(result["batch"])
    assert batch.output_file_id is not None
    assert output == strict_client.files.content(batch.output_file_id).content
    assert len(output.splitlines()) == 3


def test_the_example_with_parasail(clients: Clients, strict_client: openai.OpenAI) -> None:
    result = clients["readme_parasail"].result()
    assert (result["status"], result["errors"]) == ("completed", None)
    output = (clients["readme_parasail"].folder / result["output"]).read_text()
    assert result["output"] == f"{result['batch']}-output.jsonl"
    (line,) = map(json.loads, output.splitlines())
    assert line["response"]["body"]["choices"][0]["message"]["content"]
    assert list(read_lines(strict_client, strict_client.batches.retrieve(result["batch"]).output_file_id)) == [line]


@pytest.mark.parametrize(
    ("name", "wanted", "kind"),
    [("oldest", "1.60", "chat.completion"), ("latest", version("openai"), "list")],
)
def test_the_openai_package(clients: Clients, name: str, wanted: str, kind: str) -> None:
    result = clients[name].result()
    assert result["version"].startswith(wanted)
    assert result == {
        "version": result["version"],
        "status": "completed",
        "metadata": {"made-by": result["version"]},
        "ids": ["line-0", "line-1", "line-2"],
        "kinds": [kind],
        "cancelled": 409,
        "missing": "id",
    }
