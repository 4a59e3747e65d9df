"""Numbers 25 to 38 of the checklist: create, retrieve and list batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
import openai
import pytest

from tests.conformance.envelope import read_error
from tests.conformance.inputs import CHAT, METADATA, UNKNOWN_FILE
from tests.conformance.submissions import Submissions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TIMES = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
STATUSES = {"validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"}
PARAMETERS = {"input_file_id": UNKNOWN_FILE, "endpoint": CHAT, "completion_window": "24h"}


def refuse(plain: httpx2.Client, **parameters: object) -> Mapping[str, Any]:
    """Return the error of a batch that may not be created."""
    return read_error(plain.post("batches", json={**PARAMETERS, **parameters}), 400)


def list_all(plain: httpx2.Client, **query: int) -> Sequence[str]:
    """Follow `after` to the end; returns the ids."""
    found: list[Mapping[str, Any]] = []
    while not found or found[-1]["has_more"]:
        cursor = {"after": found[-1]["data"][-1]["id"]} if found else {}
        found.append(plain.get("batches", params={**query, **cursor}).json())
    return [batch["id"] for page in found for batch in page["data"]]


def test_h025_create(submissions: Submissions) -> None:
    created = submissions["mixed"].created
    assert created["status_code"] == 200
    assert created["id"].startswith("batch_")
    assert (created["object"], created["status"], created["errors"]) == ("batch", "validating", None)
    assert (created["endpoint"], created["completion_window"]) == (CHAT, "24h")
    assert created["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert {f"{name}_at" for name in (*TIMES, "created")} <= created.keys()
    assert {"output_file_id", "error_file_id", "input_file_id", "metadata"} <= created.keys()


def test_h026_the_rules_of_metadata(plain: httpx2.Client, submissions: Submissions) -> None:
    taken = {name: submissions[name].created["metadata"] for name in ("mixed", "all_refused", "all_good")}
    assert taken == {"mixed": METADATA, "all_refused": None, "all_good": None}
    wrong = ({**METADATA, "one": "more"}, {"k" * 65: "v"}, {"k": "v" * 513}, {"k": ["v"]}, {"k": 1})
    for metadata in wrong:
        assert str(refuse(plain, metadata=metadata)["param"]).startswith("metadata"), metadata


def test_h027_metadata_comes_back(strict_client: openai.OpenAI, submissions: Submissions) -> None:
    batch_id = submissions["mixed"].id
    assert strict_client.batches.retrieve(batch_id).metadata == METADATA
    assert [batch.metadata for batch in strict_client.batches.list(limit=100) if batch.id == batch_id] == [METADATA]


def test_h028_missing_parameters(plain: httpx2.Client) -> None:
    for name in PARAMETERS:
        sent = {key: value for key, value in PARAMETERS.items() if key != name}
        error = read_error(plain.post("batches", json=sent), 400)
        assert (error["code"], error["param"]) == ("missing_required_parameter", name)
        assert error["type"] == "invalid_request_error"


def test_h029_wrong_parameters(plain: httpx2.Client) -> None:
    error = refuse(plain, endpoint="/v1/nonsense")
    assert (error["code"], error["param"]) == ("invalid_value", "endpoint")
    for window in ("1h", "48h", ""):
        assert refuse(plain, completion_window=window)["param"] == "completion_window"


def test_h030_an_unknown_file_fails_the_batch(submissions: Submissions) -> None:
    assert submissions["unknown_file"].created["status_code"] == 200
    batch = submissions.finish("unknown_file")
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.code, error.line) for error in batch.errors.data] == [("invalid_request", None)]


def test_h031_expires_at(submissions: Submissions) -> None:
    batch = submissions.finish("mixed")
    assert batch.expires_at == batch.created_at + 86_400


def test_h032_output_expires_after(strict_client: openai.OpenAI, submissions: Submissions) -> None:
    batch = submissions.finish("mixed")
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert file_id is not None
        file = strict_client.files.retrieve(file_id)
        assert file.expires_at == file.created_at + 3600


def test_h033_the_pages_of_a_list(plain: httpx2.Client, submissions: Submissions) -> None:
    for _ in range(21 - len(plain.get("batches", params={"limit": 100}).json()["data"])):
        assert plain.post("batches", json=PARAMETERS).status_code == 200
    page = plain.get("batches").json()
    assert (page["object"], len(page["data"]), page["has_more"]) == ("list", 20, True)
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
    created = [batch["created_at"] for batch in plain.get("batches", params={"limit": 100}).json()["data"]]
    assert created == sorted(created, reverse=True)
    after = plain.get("batches", params={"after": page["data"][0]["id"]}).json()
    assert after["data"][0]["id"] == page["data"][1]["id"]
    for limit in (0, 101):
        assert read_error(plain.get("batches", params={"limit": limit}), 400)["param"] == "limit"
    known = list_all(plain, limit=100)
    assert list_all(plain, limit=7)[-len(known) :] == known  # a client may have made one meanwhile


def test_h034_the_sdk_yields_each_batch_once(
    plain: httpx2.Client, strict_client: openai.OpenAI, submissions: Submissions
) -> None:
    before = list_all(plain, limit=100)
    walked = [batch.id for batch in strict_client.batches.list(limit=1)]
    assert len(set(walked)) == len(walked)
    assert walked[-len(before) :] == before


def test_h035_unknown_batches(plain: httpx2.Client) -> None:
    for answer in (plain.get("batches/batch_unknown"), plain.post("batches/batch_unknown/cancel")):
        assert "No batch found" in read_error(answer, 404)["message"]


def test_h036_strict_mode_sdk_parses_every_status(submissions: Submissions) -> None:
    """What was seen was parsed by the client in strict mode. How long a small batch is `finalizing` is too short to be
    sure to see it from outside: tests/api has every status."""
    seen = {batch.status for submission in submissions.finish_all() for batch in submission.seen}
    assert STATUSES - {"finalizing"} <= seen <= STATUSES


def test_h037_usage(submissions: Submissions) -> None:
    usage = submissions.finish("mixed").to_dict()["usage"]
    assert isinstance(usage, dict)
    details = {"input_tokens_details": {"cached_tokens"}, "output_tokens_details": {"reasoning_tokens"}}
    assert usage.keys() == {"input_tokens", "output_tokens", "total_tokens", *details}
    assert all(usage[name].keys() == names for name, names in details.items())
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0


def test_h038_the_purpose_of_results(strict_client: openai.OpenAI, submissions: Submissions) -> None:
    batch = submissions.finish("mixed")
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert file_id is not None
        assert strict_client.files.retrieve(file_id).purpose == "batch_output"
