"""Numbers 59 to 64 of the checklist: what holds for every route."""

import uuid

import httpx2
import openai
import pytest

from tests.conformance.envelope import read_error
from tests.conformance.inputs import CHAT, UNKNOWN_FILE
from tests.conformance.sending import sent_by
from tests.conformance.submissions import Submissions
from tests.target import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROUTES = {
    "files": "GET POST",
    "files/unknown": "GET DELETE",
    "files/unknown/content": "GET",
    "uploads": "POST",
    "uploads/unknown/parts": "POST",
    "uploads/unknown/complete": "POST",
    "uploads/unknown/cancel": "POST",
    "batches": "GET POST",
    "batches/unknown": "GET",
    "batches/unknown/cancel": "POST",
}
PARAMETERS = {"input_file_id": UNKNOWN_FILE, "endpoint": CHAT, "completion_window": "24h"}
LONGEST_WAIT = 120
LIMIT = 200
TRIES = 10


def test_h059_every_refusal_is_an_envelope(plain: httpx2.Client) -> None:
    """A crash (500) cannot be asked for from outside; tests/api has it."""
    read_error(plain.get("nonsense"), 404)
    for path, methods in ROUTES.items():
        for method in {"PUT", "PATCH", "DELETE"} - set(methods.split()):
            read_error(plain.request(method, path), 405)
        if "POST" in methods:
            for content in (b"", b"{", b"[]", b"\xff"):
                answer = plain.post(path, content=content, headers={"Content-Type": "application/json"})
                read_error(answer, 400, 404, 415)
            read_error(plain.post(path, content=b"x", headers={"Content-Type": "text/plain"}), 400, 404, 415)
        if "GET" in methods and "unknown" in path:
            read_error(plain.get(path), 404)
    for path in ("files", "batches"):
        for query in ({"limit": "many"}, {"limit": "-1"}, {"after": "unknown"}):
            read_error(plain.get(path, params=query), 400, 404)


def test_h060_keys(target: Target) -> None:
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {target.api_key}"}):
        for path in ROUTES:
            with httpx2.Client(base_url=target.base_url, headers=headers, timeout=60) as nobody:
                error = read_error(nobody.get(path), 401)
                assert error["type"] == "invalid_request_error", path
    with openai.OpenAI(base_url=target.base_url, api_key="sk-wrong-0123456789abcdef") as wrong, sent_by(wrong) as sent:
        with pytest.raises(openai.AuthenticationError) as refusal:
            wrong.files.list()
        assert len(sent) == 1
    error = read_error(refusal.value.response, 401)
    assert error["code"] == "invalid_api_key"
    assert "sk-wrong-0123456789abcdef" not in error["message"]


def test_h061_request_ids(strict_client: openai.OpenAI, plain: httpx2.Client, submissions: Submissions) -> None:
    answers = [plain.request(method, path) for path in ROUTES for method in ("GET", "PUT")]
    request_ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(request_ids) == len(answers)
    raw = strict_client.batches.with_raw_response.retrieve(submissions["mixed"].id)
    assert raw.parse()._request_id == raw.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError) as missing:
        strict_client.batches.retrieve("batch_unknown")
    assert missing.value.request_id == missing.value.response.headers["x-request-id"]


def test_h062_unknown_headers_are_ignored(strict_client: openai.OpenAI, plain: httpx2.Client) -> None:
    other = strict_client.with_options(organization="org-unknown", project="proj_unknown")
    assert other.files.list(limit=1).object == "list"
    headers = {"x-stainless-os": "Minix", "x-stainless-retry-count": "many", "OpenAI-Beta": "unknown=v9"}
    assert plain.get("batches", headers=headers).status_code == 200


def test_h063_a_429_says_when_to_come_back(target: Target) -> None:
    with openai.OpenAI(base_url=target.need("limited_url"), api_key=target.api_key) as limited:
        refusal = run_into_limit(limited.with_options(max_retries=0))
        error = read_error(refusal.response, 429)
        assert error["code"]
        assert 0 < float(refusal.response.headers["retry-after"]) <= LONGEST_WAIT
        assert any(comes_back(limited) for _ in range(TRIES)), "the client came back by itself"


def comes_back(limited: openai.OpenAI) -> bool:
    """Ask once more, at a moment when it is too much; False when that moment was over before we asked."""
    run_into_limit(limited.with_options(max_retries=0))
    with sent_by(limited) as sent:
        assert limited.files.list(limit=1).object == "list"
    return len(sent) > 1


def run_into_limit(limited: openai.OpenAI) -> openai.RateLimitError:
    """Ask until it is too much."""
    for _ in range(LIMIT):
        try:
            limited.files.list(limit=1)
        except openai.RateLimitError as refusal:
            return refusal
    pytest.fail(f"{LIMIT} requests at once were answered")


def test_h064_an_idempotency_key_makes_one_batch(strict_client: openai.OpenAI, plain: httpx2.Client) -> None:
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    made = [plain.post("batches", json=PARAMETERS, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in made] == [200, 200]
    assert made[0].json()["id"] == made[1].json()["id"]
    other = plain.post("batches", json={**PARAMETERS, "metadata": {"another": "body"}}, headers=headers)
    read_error(other, 409)
